"""What the configurations of the papers cost, by formula; writes the "# cost:" lines of their headers.

    python scripts/reproduce/paper_costs.py                  # say which headers are not what their values come to
    python scripts/reproduce/paper_costs.py --write          # write them
    python scripts/reproduce/paper_costs.py FILE ...         # of these files

Counts follow from the values of a file. Floating-point operations are 2 P + 4 (layers) (width) (context) for a token of
a forward; a backward costs twice that, or once where the weights are frozen below an adapter, and once more where
layers are recomputed. Rows are taken to fill their canvas, and strategies that decide to commit one token per forward,
so that the operations are an upper bound. Left out are held-out evaluations and what depends on rewards: hints of IGPO,
rows that are dropped. Hours assume a utilisation; decoding with a cache, which waits for memory, has less.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from dllm_rl.config.load import load_config
from dllm_rl.config.plugins import build
from dllm_rl.config.schema import Config, LoraSection
from dllm_rl.diffusion.layout import block_index
from dllm_rl.driver.step_masks import step_masks
from dllm_rl.protocols.algorithm import Algorithm
from dllm_rl.types import GIVEN, RolloutBatch, Sampling

FOLDER = Path(__file__).resolve().parents[2] / "configs" / "methods"
CARD, PEAK, UTILISATION = "H100 SXM", 989e12, 0.3  # dense bfloat16, of NVIDIA's data sheet
PROMPT = 128  # tokens of a prompt with its template; questions of GSM8K and MATH have 60 to 90 on average
MARK = "# cost:"
NF4_BITS = 4.127  # with double quantisation, arXiv:2305.14314, Section 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Sizes of a checkpoint's config.json."""

    layers: int
    width: int
    keys: int  # width of all key heads
    mlp: int
    vocab: int
    block_causal: bool = False

    @property
    def linear(self) -> int:
        """Weights of the linear layers of all transformer layers."""
        return self.layers * (2 * self.width * (self.width + self.keys) + 3 * self.width * self.mlp)

    @property
    def parameters(self) -> int:
        """Of the model, but for norms and biases; embeddings are not tied."""
        return self.linear + 2 * self.vocab * self.width

    def adapter(self, lora: LoraSection) -> int:
        """Parameters of an adapter."""
        d, m = self.width, self.mlp
        sizes = {"q_proj": (d, d), "k_proj": (d, self.keys), "v_proj": (d, self.keys), "up_proj": (d, m)}
        assert lora.targets is not None and set(lora.targets) <= set(sizes), "no file has others"
        return self.layers * lora.rank * sum(sum(sizes[name]) for name in lora.targets)

    def forward(self, tokens: int, context: int) -> float:
        """Floating-point operations of a forward of so many tokens, each of which attends to the context."""
        return tokens * (2.0 * self.parameters + 4.0 * self.layers * self.width * context)


_LLADA = Shape(layers=32, width=4096, keys=4096, mlp=12288, vocab=126464)
_QWEN_7B = Shape(layers=28, width=3584, keys=512, mlp=18944, vocab=152064)
_SDAR_8B = Shape(layers=36, width=4096, keys=1024, mlp=12288, vocab=151936, block_causal=True)
SHAPES = {
    "GSAI-ML/LLaDA-8B-Instruct": _LLADA,
    "apple/DiffuCoder-7B-Instruct": _QWEN_7B,
    "JetLM/SDAR-8B-Chat": _SDAR_8B,
    "JetLM/SDAR-8B-Chat-b32": _SDAR_8B,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What a run comes to.

    Attributes:
        steps: batches.
        prompts: of a step; rows of a file for supervised training.
        samples: completions per prompt, of the policy and of experts; 1 or 2 for demonstrations and pairs.
        decoded: whether they are decoded.
        updates_per_step: optimiser updates of a step.
        canvas: tokens of a completion at most.
        forwards: of a completion at most, without those that only store keys and values.
        draws: forwards per likelihood and row.
        decoding: floating-point operations of the rollouts.
        scoring: of likelihoods without gradient, before the updates.
        updating: of the updates.
        memory: GB of each GPU by what they are for, before activations and caches.
    """

    steps: int
    prompts: int
    samples: int
    decoded: bool
    updates_per_step: int
    canvas: int
    forwards: int
    draws: int
    decoding: float
    scoring: float
    updating: float
    memory: dict[str, float]

    @property
    def gpu_hours(self) -> float:
        """Of one card."""
        return (self.decoding + self.scoring + self.updating) / (UTILISATION * PEAK) / 3600

    def lines(self) -> list[str]:
        """What the header says."""
        rows = self.steps * self.prompts * self.samples
        counts = f"{self.steps:,} steps x {self.prompts} prompts x {self.samples} = {rows:,} rows"
        updates = f"{self.updates_per_step} a step = {self.steps * self.updates_per_step:,} updates"
        decode = f"{self.forwards:,} to decode a row, " if self.decoded else ""
        tokens = f"at most {rows * self.canvas / 1e6:,.1f} M tokens; forwards: {decode}{self.draws} per likelihood"
        parts = (("decode", self.decoding), ("score", self.scoring), ("update", self.updating))
        work = " + ".join(f"{flop:.1e} ({name})" for name, flop in parts if flop)
        speed = f"{UTILISATION:.0%} of {PEAK / 1e12:.0f} TFLOP/s"
        held = ", ".join(f"{what} {gb:.1f}" for what, gb in self.memory.items())
        return [
            f"{MARK} {counts}; {updates}",
            f"{MARK} {tokens}",
            f"{MARK} {work} FLOP",
            f"{MARK} = about {_rounded(self.gpu_hours):,} hours of one {CARD} at {speed}",
            f"{MARK} {sum(self.memory.values()):.0f} GB a GPU before activations: {held}",
        ]


def cost(config: Config) -> Cost:
    """What a configuration comes to.

    Args:
        config: of a model in SHAPES.
    """
    assert config.model.path is not None, "a released checkpoint"
    shape, canvas, learner = SHAPES[config.model.path], config.sampling.max_new_tokens, config.learner
    algorithm: Algorithm = build("algorithms", config.algorithm.name, config.algorithm.options)
    needs, sampling = algorithm.needs, Sampling(**config.sampling.model_dump(exclude={"preset", "strategy"}))
    block = config.model.block_size if shape.block_causal else sampling.block_size
    block = block or canvas
    steps_per_block = sampling.steps_per_block(block)
    forwards, whole = canvas // block * steps_per_block, PROMPT + canvas
    turns = learned_turns = 1
    if config.rollout.rollouter.name == "denoising_steps":
        turns = -(-canvas // config.rollout.rollouter.options["tokens_per_step"])
        learned_turns = min(turns, algorithm.config.steps)
    samples = {"rollouts": config.data.samples_per_prompt, "demonstrations": 1, "pairs": 2}[needs.source]
    samples += len(getattr(algorithm.config, "experts", None) or ())
    rows = config.run.steps * config.data.prompts_per_step * samples
    if needs.source != "rollouts":
        decoding = 0.0
    elif shape.block_causal:  # committed blocks are cached, at the cost of one more forward each
        decoding = shape.forward(PROMPT, PROMPT) + shape.forward((forwards + canvas // block) * block, whole)
    else:
        decoding = turns * forwards * shape.forward(whole, whole)
    masks = step_masks(algorithm, _full_row(canvas, block, shape, steps_per_block, forwards), config, 0)
    draws, sets = masks[0].mask.shape[0], len(masks)
    scored = learned_turns * draws * shape.forward(PROMPT + canvas * (2 if shape.block_causal else 1), whole)
    parts = min(learner.minibatches, config.data.prompts_per_step)
    # A first update on the whole batch scores the old policy itself.
    old = needs.old * (sets if parts > 1 else sets - 1)
    backward = 1 if config.model.lora is not None else 2
    update = 2 + backward + config.model.gradient_checkpointing  # without a graph, with one, backward, recomputation
    trains = "model" in needs.trains
    return Cost(
        steps=config.run.steps,
        prompts=config.data.prompts_per_step,
        samples=samples,
        decoded=needs.source == "rollouts",
        updates_per_step=learner.updates_per_step * parts,
        canvas=canvas,
        forwards=turns * forwards,
        draws=learned_turns * draws,
        decoding=rows * decoding,
        scoring=trains * rows * (old + sets * (needs.reference + needs.entropy)) * scored,
        updating=trains * rows * learner.updates_per_step * update * scored,
        memory=_memory(config, shape, trains=trains, reference=needs.reference),
    )


def _full_row(canvas: int, block: int, shape: Shape, steps_per_block: int, forwards: int) -> RolloutBatch:
    """A row that fills its canvas, decoded block by block with as many tokens in every forward."""
    length, start = PROMPT + canvas, torch.tensor([PROMPT])
    valid = torch.ones(1, length, dtype=torch.bool)
    completion = valid & (torch.arange(length) >= PROMPT)
    place = torch.arange(canvas)
    step = torch.full((1, length), GIVEN)
    step[0, PROMPT:] = place // block * steps_per_block + place % block * steps_per_block // block
    return RolloutBatch(
        tokens=torch.zeros(1, length, dtype=torch.int64),
        valid=valid,
        completion=completion,
        hint=torch.zeros_like(valid),
        tail=torch.zeros_like(valid),
        unmask_step=step,
        behaviour_logp=torch.zeros(1, length),
        prompt_length=start,
        group=torch.zeros(1, dtype=torch.int64),
        num_forwards=torch.tensor([forwards]),
        weights_step=step.clamp(max=0),
        block_ids=block_index(start, length, block, "response") if shape.block_causal else None,
        exact=True,
    ).check()


def _memory(config: Config, shape: Shape, *, trains: bool, reference: bool) -> dict[str, float]:
    learner, lora, ranks = config.learner, config.model.lora, config.cluster.learners
    weights = 2.0 * shape.parameters
    if config.model.quantize is not None:
        weights += shape.linear * (NF4_BITS / 8 - 2)
    held = {"weights": weights if learner.zero_stage < 3 or ranks == 1 else weights / ranks}
    if trains and lora is not None:  # float32, with its gradient and two moments
        held["adapter with AdamW"] = 16.0 * shape.adapter(lora)
    elif trains:
        held["masters, gradients, moments"] = 16.0 * shape.parameters / ranks
        if reference and not learner.precompute_reference:
            held["reference"] = weights
    if config.cluster.kind == "ray" and config.cluster.colocate:
        held["engine"] = weights
    return {what: size / 1e9 for what, size in held.items()}


def _rounded(number: float) -> int:
    """To two figures."""
    digits = max(0, len(str(int(number))) - 2)
    return round(number / 10**digits) * 10**digits


def with_costs(text: str, lines: Sequence[str]) -> str:
    """A file with its cost lines replaced; new ones are put at the end of the header.

    Args:
        text: of the file.
        lines: of Cost.lines().
    """
    old = text.splitlines()
    kept = [line for line in old if not line.startswith(MARK)]
    place = next((i for i, line in enumerate(old) if line.startswith(MARK)), None)
    if place is None:
        place = next(i for i, line in enumerate(old) if not line.startswith("#"))
    return "\n".join([*kept[:place], *lines, *kept[place:]]) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare or write; 1 if a header is not what its values come to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, help="default: all of configs/methods")
    parser.add_argument("--write", action="store_true", help="write the lines into the files")
    options = parser.parse_args(arguments)
    wrong = 0
    for path in options.files or files():
        text = path.read_text(encoding="utf-8")
        wanted = with_costs(text, cost(load_config(path)).lines())
        if wanted == text:
            continue
        wrong += 1
        print(f"{path.name}: {'written' if options.write else 'its cost lines are not what its values come to'}")
        if options.write:
            path.write_text(wanted, encoding="utf-8")
    return int(wrong > 0 and not options.write)


def files() -> list[Path]:
    """The configurations at the scale of the papers."""
    return sorted([*FOLDER.glob("*_paper.yaml"), FOLDER / "igpo_sft.yaml"])


if __name__ == "__main__":
    sys.exit(main())
