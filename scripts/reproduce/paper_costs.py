"""What the configurations of the papers cost, by formula; writes the "# cost:" lines of their headers.

    python scripts/reproduce/paper_costs.py                  # say which headers are not what their values come to
    python scripts/reproduce/paper_costs.py --write          # write them
    python scripts/reproduce/paper_costs.py FILE ...         # of these files

Counts and operations are those of dllm_rl/planning/work.py. Hours assume a utilisation; decoding with a cache, which
waits for memory, has less.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dllm_rl.config.load import load_config
from dllm_rl.config.plugins import build
from dllm_rl.config.schema import Config
from dllm_rl.planning.work import Shape, Work, work_of

FOLDER = Path(__file__).resolve().parents[2] / "configs" / "methods"
CARD, PEAK, UTILISATION = "H100 SXM", 989e12, 0.3  # dense bfloat16, of NVIDIA's data sheet
PROMPT = 128  # tokens of a prompt with its template; questions of GSM8K and MATH have 60 to 90 on average
MARK = "# cost:"
NF4_BITS = 4.127  # with double quantisation, arXiv:2305.14314, Section 3


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
class Cost(Work):
    """What a run comes to.

    Attributes:
        memory: GB of each GPU by what they are for, before activations and caches.
    """

    memory: dict[str, float]

    @property
    def gpu_hours(self) -> float:
        """Of one card."""
        return self.hours(UTILISATION * PEAK)

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
    shape, needs = SHAPES[config.model.path], build("algorithms", config.algorithm.name, config.algorithm.options).needs
    held = _memory(config, shape, trains="model" in needs.trains, reference=needs.reference)
    return Cost(**dataclasses.asdict(work_of(config, shape, PROMPT)), memory=held)


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


def with_lines(text: str, lines: Sequence[str], mark: str = MARK) -> str:
    """A file with the lines that begin with a mark replaced; new ones are put at the end of the header.

    Args:
        text: of the file.
        lines: new ones.
        mark: what they begin with.
    """
    old = text.splitlines()
    kept = [line for line in old if not line.startswith(mark)]
    place = next((i for i, line in enumerate(old) if line.startswith(mark)), None)
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
        wanted = with_lines(text, cost(load_config(path)).lines())
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
