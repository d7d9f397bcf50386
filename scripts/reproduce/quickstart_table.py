"""What each algorithm did on the quickstart at equal budget: 256 rows x 200 steps from the same SFT start.

    python scripts/reproduce/quickstart_table.py --output runs/table --seeds 0 1 2

Runs that are finished in --output are not repeated. Prints a Markdown table and writes table.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console

from dllm_rl.cli.output import write_json
from dllm_rl.cli.progress import RichProgress
from dllm_rl.config.load import load_config
from dllm_rl.config.schema import Config
from dllm_rl.evaluation.intervals import paired_difference
from dllm_rl.train import train

CONFIGS = Path(__file__).resolve().parents[2] / "configs"

# Row -> overrides of sudoku4_rl.yaml. The optimiser, the learning rate and the number of rows are the same in all.
ROWS: dict[str, list[str]] = {
    "trace_rl": [],
    "coupled_grpo": ["algorithm={name: coupled_grpo}"],
    "diffu_grpo": ["algorithm={name: diffu_grpo}"],
    "masked_sft": ["algorithm={name: masked_sft}", "data.prompts_per_step=256", "data.samples_per_prompt=1"],
    "trace_rl, shuffled advantages": ['algorithm.name="controls:ShuffledTraceRL"'],
    "coupled_grpo, 4 pairs": ["algorithm={name: coupled_grpo, pairs: 4}"],
    "coupled_grpo, credited tokens": ['algorithm={name: "controls:CreditedCoupledGRPO"}'],
}
STARTS: dict[str, list[str]] = {
    "quickstart": [],
    "annealed": ["learner.schedule=cosine"],
    "supervised": [],  # the quickstart's start after the masked_sft row
}


def start(name: str, seed: int, output: Path, progress: RichProgress) -> Path:
    """The model that the rows begin with, trained if it is not there."""
    if name == "supervised":
        config = row_config("masked_sft", "quickstart", seed, output, progress)
        run(config, progress)
        return output / config.run.name / "checkpoints" / f"step-{config.run.steps:06d}" / "model"
    common = [f"run.seed={seed}", f"run.output={output}", f"run.name=start-{name}-seed{seed}"]
    config = load_config(CONFIGS / "sudoku4_sft.yaml", [*common, *STARTS[name]])
    model = output / config.run.name / "checkpoints" / f"step-{config.run.steps:06d}" / "model"
    if not model.exists():
        train(config, progress=progress)
    return model


def row_config(row: str, start_name: str, seed: int, output: Path, progress: RichProgress) -> Config:
    """The configuration of one run of the table."""
    slug = "".join(c if c.isalnum() else "-" for c in row).replace("--", "-")
    overrides = [
        f"run.seed={seed}",
        f"run.output={output}",
        f"run.name={start_name}-{slug}-seed{seed}",
        f"model.path={start(start_name, seed, output, progress)}",
    ]
    return load_config(CONFIGS / "sudoku4_rl.yaml", [*overrides, *ROWS[row]])


def run(config: Config, progress: RichProgress) -> dict[str, Any]:
    """Figures of one run, from its folder if it has finished before."""
    result = Path(config.run.output) / config.run.name / "result.json"
    if result.exists():
        finished: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
        return finished
    summary = train(config, progress=progress)
    figures: dict[str, Any] = {"train_seconds": summary.seconds["step_s"]}
    for before, after in zip(summary.before, summary.after, strict=True):
        pairs = [(b, a) for b, a in zip(before.solved, after.solved, strict=True) if b is not None and a is not None]
        mean, low, high = paired_difference([b for b, _ in pairs], [a for _, a in pairs])
        figures[f"{before.tokens_per_step}_per_step"] = {
            "before": before.summary(),
            "after": after.summary(),
            "gain": {"mean": mean, "low": low, "high": high, "boards": len(pairs)},
        }
    write_json(result, figures)
    return figures


def line(row: str, results: list[dict[str, Any]]) -> str:
    """One Markdown row over the seeds."""
    parallel, serial = ([r[f"{speed}_per_step"] for r in results] for speed in (4, 1))
    moves = "; ".join(f"{100 * r['before']['success']:.1f} -> {100 * r['after']['success']:.1f}" for r in parallel)
    gains = "; ".join(
        f"{100 * r['gain']['mean']:+.1f} [{100 * r['gain']['low']:+.1f}, {100 * r['gain']['high']:+.1f}]"
        for r in parallel
    )
    alone = "; ".join(f"{100 * r['before']['success']:.0f} -> {100 * r['after']['success']:.0f}" for r in serial)
    cells = "; ".join(
        f"{r['before']['components']['sudoku_cells']:.2f} -> {r['after']['components']['sudoku_cells']:.2f}"
        for r in parallel
    )
    seconds = sum(r["train_seconds"] for r in results) / len(results)
    return f"| {row} | {moves} | {gains} | {alone} | {cells} | {seconds:.0f} |"


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/quickstart-table"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--start", default="quickstart", choices=list(STARTS))
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    progress = RichProgress(Console(stderr=True))
    table: dict[str, list[dict[str, Any]]] = {}
    for seed in arguments.seeds:
        for row in arguments.rows:
            progress.log(f"{row}, seed {seed}")
            config = row_config(row, arguments.start, seed, arguments.output, progress)
            table.setdefault(row, []).append(run(config, progress))
    write_json(arguments.output / f"table-{arguments.start}.json", table)
    print("| algorithm | boards at 4 per forward, % | gain, points [95%] | boards at 1, % | cells at 4 | train s |")
    print("|---|---|---|---|---|---|")
    for row, results in table.items():
        print(line(row, results))


if __name__ == "__main__":
    main()
