"""The "# plan:" lines in the headers of configs/lora_*.yaml: what dllm-rl plan says of them.

    python scripts/reproduce/plan_headers.py            # say which headers are not what their values come to
    python scripts/reproduce/plan_headers.py --write    # write them

The model is LLaDA-8B-Instruct by its config.json; nothing is downloaded. Prompts have a mean of 130 tokens
and at most 320: questions of GSM8K with the chat template and what is asked of the answer.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from paper_costs import with_lines

from dllm_rl.config.load import load_config
from dllm_rl.config.schema import Config
from dllm_rl.models.denoiser import TransformersDenoiser
from dllm_rl.models.llada import LLADA
from dllm_rl.planning.cards import CARDS
from dllm_rl.planning.memory import PHASES
from dllm_rl.planning.plan import Plan, Prompts, plan_of, seconds_of
from dllm_rl.types import Prompt

FOLDER = Path(__file__).resolve().parents[2] / "configs"
FILES = {FOLDER / "lora_llada8b_24gb.yaml": "rtx4090-24gb", FOLDER / "lora_llada8b_80gb.yaml": "h100-80gb"}
MARK = "# plan:"
MEAN, LONGEST, ROWS, UTILISATION = 130, 320, 7473, 0.3
MASK, EOS = 126336, 126081
_TERMS = 4


def model() -> TransformersDenoiser:
    """LLaDA-8B-Instruct without weights."""
    config = LLADA.new_config(
        {
            "hidden_size": 4096,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "intermediate_size": 12288,
            "vocab_size": 126464,
            "max_position_embeddings": 4096,
            "tie_word_embeddings": False,
            "rope_theta": 500000.0,
            "rms_norm_eps": 1e-5,
            "mask_token_id": MASK,
            "eos_token_id": EOS,
            "pad_token_id": EOS,
        }
    )
    module = LLADA.skeleton(config, torch.bfloat16)
    return TransformersDenoiser(module, LLADA, config, mask_id=MASK, eos_id=EOS, pad_id=EOS)


def planned(config: Config, card: str) -> Plan:
    """The plan of a configuration.

    Args:
        config: of LLaDA-8B-Instruct on GSM8K.
        card: of CARDS.
    """
    first = Prompt(uid="", token_ids=(0,) * MEAN, text="", answer="", task="gsm8k")
    prompts = Prompts(first=first, limit=LONGEST, longest=LONGEST, mean=MEAN, looked_at=ROWS, rows=ROWS)
    return plan_of(config, model(), prompts, CARDS[card])


def lines(plan: Plan, card: str) -> list[str]:
    """What the header says."""
    (device,), batch, chosen = plan.memory.devices, plan.memory.batch, CARDS[card]
    assert chosen.flops is not None, "all of CARDS have a speed"
    seconds = sum(
        seconds_of(plan, dict.fromkeys(("decoding", "scoring", "updating"), UTILISATION * chosen.flops)).values()
    )
    phases = ", ".join(f"{phase} {device.of(phase) / 1e9:.1f}" for phase in PHASES)
    largest = ", ".join(f"{t.name} {t.bytes / 1e9:.1f}" for t in device.largest(device.worst)[:_TERMS])
    trained = f"{plan.memory.states.trained / 1e6:.0f} M of {plan.parameters / 1e6:,.0f} M parameters trained"
    return [
        f"{MARK} {batch.prompts} prompts x {batch.samples} = {batch.rows} rows a step, {batch.updates} updates, "
        f"{batch.microbatches} micro-batches of {batch.micro.number} copies; {trained}",
        f"{MARK} GB by phase: {phases}; {chosen.usable / 1e9:.1f} of {card} can be used",
        f"{MARK} {largest}",
        f"{MARK} {seconds:.0f} s a step, {seconds * plan.work.steps / 3600:.0f} hours of one {card} at "
        f"{UTILISATION:.0%} of {chosen.flops / 1e12:.0f} TFLOP/s, prompts of {MEAN} tokens, {LONGEST} at most",
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare or write; 1 if a header is not what its values come to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the lines into the files")
    write, wrong = parser.parse_args(arguments).write, 0
    for path, card in FILES.items():
        text = path.read_text(encoding="utf-8")
        wanted = with_lines(text, lines(planned(load_config(path), card), card), MARK)
        if wanted == text:
            continue
        wrong += 1
        print(f"{path.name}: {'written' if write else 'its plan lines are not what its values come to'}")
        if write:
            path.write_text(wanted, encoding="utf-8")
    return int(wrong > 0 and not write)


if __name__ == "__main__":
    sys.exit(main())
