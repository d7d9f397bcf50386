"""Whether checkpoints that dllm-rl writes load where the hub's own code runs: an environment with transformers 4.

    python scripts/parity/hub_loading.py --tokenizer sdar=FOLDER --code llada=FOLDER --code dream=FOLDER

Makes that environment (once), saves tiny random models with each tokenizer, loads them there, and compares token ids of
texts with special tokens and Unicode, of conversations, and the logits of the published model code with ours, also with
adapters that peft made there and that dllm-rl saved again. FOLDER is a hub folder; of --tokenizer it needs the
tokenizer's files, of --code the .json and .py files. No weights are read. Logits are compared for families with full
attention. Prints a table; the exit code is 1 if anything differs.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from dllm_rl.models.create import create_denoiser
from dllm_rl.models.denoiser import TransformersDenoiser
from dllm_rl.models.loading import load_denoiser, save_denoiser
from dllm_rl.models.lora import load_adapter, save_adapter
from dllm_rl.models.tokenizers import byte_bpe_tokenizer, character_tokenizer

READER = Path(__file__).with_name("hub_reader.py")
CORPUS = ["the cat sat on the mat.\n", "Zwölf Boxkämpfer, 日本語 🙂 + 12 = 24"] * 20
TEXTS = ["the cat", "  two  spaces\n\n\ttab ", "Zwölf 日本語 🙂 ∂x", "12 + 34 = 46", "don't, stop .", "\n"]
CHATS = [
    [{"role": "user", "content": "Hi"}],
    [
        {"role": "system", "content": "Be brief. 日本"},
        {"role": "user", "content": " 1+1? \n"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "don't"},
    ],
]
ADAPTERS: dict[str, dict[str, dict[str, Any]]] = {
    "llada": {
        "d1": {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj", "gate_proj"]},
        "ff_out": {"target_modules": ["ff_out"], "use_rslora": True},
        "all-linear": {"target_modules": "all-linear", "rank_pattern": {"q_proj": 1}, "alpha_pattern": {"0.v_proj": 3}},
    },
    "dream": {"all-linear": {"target_modules": "all-linear", "rank_pattern": {"0.self_attn.q_proj": 1}}},
}
TOLERANCE = 1e-4  # nats, float32, logits of a few units


def main() -> int:
    """Run everything; 1 if something differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--environment", type=Path, default=Path.home() / ".cache" / "dllm-rl" / "transformers4")
    parser.add_argument("--transformers", default="4.57.*", help="release to install there")
    parser.add_argument("--tokenizer", action="append", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--code", action="append", default=[], metavar="FAMILY=FOLDER")
    arguments = parser.parse_args()
    python = _environment(arguments.environment, arguments.transformers)
    rows: list[tuple[str, str, str]] = []
    with tempfile.TemporaryDirectory() as name:
        made = {"characters": character_tokenizer("".join(sorted({c for t in TEXTS for c in t})))}
        made["byte_bpe"] = byte_bpe_tokenizer(CORPUS, 400)
        made |= {label: AutoTokenizer.from_pretrained(folder) for label, folder in _pairs(arguments.tokenizer)}
        for label, tokenizer in made.items():
            folder = Path(name) / "tokenizers" / label
            denoiser = create_denoiser(
                "tiny", tokenizer, hidden_size=8, num_layers=1, num_heads=1, max_length=8, seed=0
            )
            rows += _compare(python, f"tokenizer {label}", denoiser, tokenizer, folder)
        for family, source in _pairs(arguments.code):
            denoiser = _with_code(family, Path(source), made["byte_bpe"], Path(name) / "source" / family)
            rows += _compare(python, f"family {family}", denoiser, made["byte_bpe"], Path(name) / family, logits=True)
    width = max(len(where) for where, _, _ in rows)
    for where, what, result in rows:
        print(f"{where:{width}}  {what:17}  {result}")
    return int(any(not result.startswith("equal") for _, _, result in rows))


def _compare(
    python: Path, where: str, denoiser: TransformersDenoiser, tokenizer: Any, folder: Path, *, logits: bool = False
) -> list[tuple[str, str, str]]:
    """Save, load with transformers 4, compare: rows of the table."""
    save_denoiser(denoiser, tokenizer, folder)
    special = [tokenizer.convert_ids_to_tokens(number) for number in sorted(tokenizer.added_tokens_decoder)]
    texts = [*TEXTS, *(f"12{token} 3" for token in special)]
    chats = CHATS if tokenizer.chat_template else []
    tokens = torch.arange(3, 19)[None] % len(tokenizer)
    tokens[0, ::3] = denoiser.mask_id
    wanted = {"folder": str(folder), "texts": texts, "chats": chats, "rows": tokens.tolist() if logits else []}
    there = _read(python, wanted)
    if isinstance(there, str):
        return [(where, "loads", there)]
    here = {
        "texts": [tokenizer.encode(text, add_special_tokens=False) for text in texts],
        "chats": [tokenizer.apply_chat_template(c, add_generation_prompt=True, return_dict=False) for c in chats],
        "special": [tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.mask_token_id],
    }
    rows = []
    for what, ours in here.items():
        odd = [place for place, ids in enumerate(ours) if ids != there[what][place]]
        result = f"differ: number {odd[0]}, {ours[odd[0]]} and {there[what][odd[0]]}" if odd else f"equal ({len(ours)})"
        rows.append((where, what, result))
    if logits:
        rows.append((where, "logits", _gap(denoiser, tokens, there["logits"])))
        for label, options in ADAPTERS.get(denoiser.family.name, {}).items():
            target, saved = folder / f"peft-{label}", folder / f"saved-{label}"
            made = _read(python, wanted | {"adapter": {"folder": str(target), "r": 4, "lora_alpha": 8, **options}})
            if isinstance(made, str):
                return [*rows, (where, label, made)]
            adapted = load_denoiser(folder)[0]
            load_adapter(adapted, target)
            rows.append((where, f"{label}, read", _gap(adapted, tokens, made["logits"])))
            save_adapter(adapted, saved)
            back = _read(python, wanted | {"adapter": str(saved)})
            rows.append(
                (where, f"{label}, saved", back if isinstance(back, str) else _gap(adapted, tokens, back["logits"]))
            )
    return rows


def _read(python: Path, wanted: dict[str, Any]) -> dict[str, Any] | str:
    """The answer of hub_reader.py, or the last line of its error."""
    request = json.dumps({"adapter": None, **wanted})
    done = subprocess.run([python, READER], input=request, capture_output=True, text=True, check=False)
    found: dict[str, Any] | str
    found = done.stderr.strip().splitlines()[-1] if done.returncode else json.loads(done.stdout)
    return found


def _gap(denoiser: TransformersDenoiser, tokens: torch.Tensor, logits: list[Any]) -> str:
    mask, valid = tokens == denoiser.mask_id, torch.ones_like(tokens, dtype=torch.bool)
    mask[:, 0] &= not denoiser.shift
    with torch.no_grad():
        ours = denoiser.unembed(denoiser.hidden_states(tokens, mask, valid)[0])
    theirs = torch.tensor(logits)[0]
    if denoiser.shift:
        theirs, ours = theirs[:-1], ours[1:]
    gap = (ours - theirs).abs().max().item()
    verdict = "equal" if gap <= TOLERANCE else "differ"
    return f"{verdict} (by at most {gap:.1e} of {theirs.abs().max():.2g})"


def _with_code(family: str, source: Path, tokenizer: Any, folder: Path) -> TransformersDenoiser:
    """A random model that was loaded from a folder with the published code, as a user's is."""
    sizes = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "max_length": 64}
    made = create_denoiser(family, tokenizer, **sizes, seed=0)
    with torch.no_grad():
        for parameter in made.module.parameters():  # created weights give logits near 0, which would hide a difference
            parameter.mul_(10 if parameter.dim() > 1 else 1)
    save_denoiser(made, tokenizer, folder)
    for file in (*source.glob("*.py"), *source.glob("generation_config.json")):
        shutil.copyfile(file, folder / file.name)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = json.loads((source / "config.json").read_text())["auto_map"]
    (folder / "config.json").write_text(json.dumps(config))
    return load_denoiser(folder)[0]


def _environment(folder: Path, release: str) -> Path:
    python = folder / "bin" / "python"
    if not python.exists():
        print(f"installing transformers {release} into {folder}", file=sys.stderr)
        venv.create(folder, with_pip=True)
        packages = [f"torch=={torch.__version__.split('+')[0]}", f"transformers=={release}", "peft==0.17.1"]
        subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
    return python


def _pairs(arguments: list[str]) -> list[tuple[str, str]]:
    return [(name, folder) for name, _, folder in (argument.partition("=") for argument in arguments)]


if __name__ == "__main__":
    sys.exit(main())
