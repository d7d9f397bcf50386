"""The quickstart: masked SFT, then reinforcement learning at 4 tokens per forward, and what that changed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from dllm_rl.cli.output import evaluation_table, stdout, write_json
from dllm_rl.config.load import load_config
from dllm_rl.config.schema import Config
from dllm_rl.errors import UserError
from dllm_rl.evaluation.evaluate import Evaluation
from dllm_rl.evaluation.intervals import paired_difference
from dllm_rl.reports.progress import Progress
from dllm_rl.train import Summary, train


def run_demo(seed: int, output: Path, json_path: Path | None, progress: Progress) -> None:
    """Run both phases and print, write and plot the comparison.

    Args:
        seed: of both runs.
        output: parent of the two run folders.
        json_path: where the figures go besides <output>/quickstart-seed<N>.json.
        progress: where to show progress.
    """
    started = time.perf_counter()
    common = [f"run.seed={seed}", f"run.output={output}"]
    sft = load_config(_config("sudoku4_sft.yaml"), [*common, f"run.name=quickstart-sft-seed{seed}"])
    model = output / sft.run.name / "checkpoints" / f"step-{sft.run.steps:06d}" / "model"
    overrides = [*common, f"run.name=quickstart-rl-seed{seed}", f"model.path={model}"]
    rl = load_config(_config("sudoku4_rl.yaml"), overrides)
    for config in (sft, rl):
        if (Path(config.run.output) / config.run.name).exists():
            there = Path(config.run.output) / config.run.name
            raise UserError(f"'{there}' is there already; remove it, or use another --seed or --output")
    progress.log(f"1/2 masked SFT on 4x4 Sudoku: {sft.run.steps} steps of {sft.data.prompts_per_step} boards")
    taught = train(sft, progress=progress)
    progress.log(
        f"2/2 reinforcement learning, {rl.sampling.tokens_per_step} tokens per forward: {rl.run.steps} steps of "
        f"{rl.data.prompts_per_step} x {rl.data.samples_per_prompt} boards"
    )
    learned = train(rl, progress=progress)
    result = _result(seed, rl, taught, learned, time.perf_counter() - started)
    own_json = output / f"quickstart-seed{seed}.json"
    write_json(own_json, result)
    write_json(json_path, result)
    _show(result, learned, own_json)


def _config(name: str) -> Path:
    """A configuration of the source tree, or of the installed package."""
    tree = Path(__file__).resolve().parents[2] / "configs" / name
    return tree if tree.is_file() else Path(str(files("dllm_rl") / "configs" / name))


def _result(seed: int, config: Config, taught: Summary, learned: Summary, seconds: float) -> dict[str, Any]:
    speeds = {}
    for before, after in zip(learned.before, learned.after, strict=True):
        pairs = [(b, a) for b, a in zip(before.solved, after.solved, strict=True) if b is not None and a is not None]
        mean, low, high = paired_difference([b for b, _ in pairs], [a for _, a in pairs])
        speeds[f"{before.tokens_per_step}_per_step"] = {
            "before": before.summary(),
            "after": after.summary(),
            "board_accuracy_gain": {"mean": mean, "low": low, "high": high, "boards": len(pairs)},
        }
    return {
        "seed": seed,
        "trained_at_tokens_per_step": config.sampling.tokens_per_step,
        "held_out": speeds,
        "seconds": {
            "total": seconds,
            "sft": {k: round(v, 2) for k, v in taught.seconds.items()},
            "rl": {k: round(v, 2) for k, v in learned.seconds.items()},
        },
        "runs": {"sft": str(taught.folder), "rl": str(learned.folder)},
        "plot": str(learned.folder / "plot.png"),
    }


def _show(result: dict[str, Any], learned: Summary, json_path: Path) -> None:
    console = stdout()
    rows: list[tuple[str, Evaluation]] = []
    phases: Sequence[tuple[str, Sequence[Evaluation]]] = (("before RL", learned.before), ("after RL", learned.after))
    for phase, evaluations in phases:
        rows += [(f"{phase}, {e.tokens_per_step} per step", e) for e in evaluations]
    console.print(evaluation_table("held-out boards (greedy)", rows))
    for name, speed in result["held_out"].items():
        gain = speed["board_accuracy_gain"]
        console.print(
            f"board accuracy at {name.replace('_', ' ')}: {gain['mean']:+.1%} by RL, 95% interval "
            f"{gain['low']:+.1%} .. {gain['high']:+.1%} over {gain['boards']} boards",
            highlight=False,
        )
    phases_s = "; ".join(
        f"{phase} "
        + ", ".join(f"{k.removesuffix('_s')} {v:.0f}" for k, v in result["seconds"][phase].items() if v >= 1)
        for phase in ("sft", "rl")
    )
    console.print(f"seconds: total {result['seconds']['total']:.0f}; {phases_s}", highlight=False)
    print(f"figures: {json_path}\nplot: {result['plot']}")
