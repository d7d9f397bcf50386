"""What decoding ahead gains: steps per second with max_staleness 1 against strictly on-policy.

    python scripts/benchmark/overlap.py

Real runs on a private Ray cluster, one engine and one learner with a core each, on a model that is large enough for the
two to be what takes the time. The workload is balanced first: learning scores as many pairs of masks as take about as
long as decoding. Runs alternate, and the figure is the ratio of medians.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from pathlib import Path

os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from dllm_rl.config.load import load_config
from dllm_rl.reports.run_folder import read_rows
from dllm_rl.train import train

ROOT = Path(__file__).resolve().parents[2]


def steps(name: str, folder: str, number: int, *overrides: str) -> dict[str, float]:
    """Median seconds of the parts of a step; the first three are left out, in which workers warm up."""
    config = load_config(
        ROOT / "configs" / "tiny_sudoku_ray.yaml",
        [
            *(f"run.output={folder}", f"run.name={name}", f"run.steps={number}", "cluster.address=local"),
            *("cluster.engines=1", "cluster.cpus_per_engine=0.5", "cluster.cpus_per_learner=0.5"),
            *("data.prompts_per_step=32", "data.samples_per_prompt=8", "rollout.rows_per_call=64"),
            "model.init={hidden_size: 96, num_layers: 3, num_heads: 4, max_length: 40}",
            *("evaluate.at_end=false", "checkpoint.every_steps=null", "diagnostics.every_steps=null"),
            # The same work in every step: rewards that differ within nearly every group, and weights that stay.
            *("rewards=[{name: sudoku_cells}, {name: sudoku}]", "learner.lr=1.0e-12"),
            *overrides,
        ],
    )
    rows = list(read_rows(train(config).folder / "metrics.jsonl"))[3:]
    names = [name for name in rows[0] if name.endswith("_s")]
    return {name: statistics.median(row[name] for row in rows) for name in names}


def main() -> None:
    """Print the balance and the gain."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--repeat", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        best: tuple[float, tuple[str, ...], dict[str, float]] | None = None
        for pairs in (4, 6, 8, 10):
            overrides = (
                "sampling={max_new_tokens: 16, block_size: 4}",
                f"algorithm={{name: coupled_grpo, pairs: {pairs}, beta: 0.0}}",
            )
            found = steps(f"balance-{pairs}", folder, 7, *overrides)
            rollout, update = found["rollout_s"], found["update_s"]
            print(f"{pairs} pairs: rollout {rollout:.2f} s, update {update:.2f} s", flush=True)
            uneven = max(rollout, update) / min(rollout, update)
            if best is None or uneven < best[0]:
                best = uneven, overrides, found
        assert best is not None
        print(f"taken: {', '.join(best[1])}")
        medians: dict[str, list[float]] = {}
        for number in range(arguments.repeat):
            for name, more in {
                "on-policy": (),
                "staleness 1": ("rollout.max_staleness=1",),
                "staleness 1, pausing": ("rollout.max_staleness=1", "rollout.pause_blocks=1"),
            }.items():
                found = steps(
                    f"{name.replace(' ', '-').replace(',', '')}-{number}", folder, arguments.steps, *best[1], *more
                )
                medians.setdefault(name, []).append(found["step_s"])
                print(f"{name}: " + ", ".join(f"{k} {v:.2f}" for k, v in found.items()), flush=True)
        base = statistics.median(medians["on-policy"])
        for name, values in medians.items():
            median = statistics.median(values)
            print(f"{name:22} {median:.2f} s per step, {base / median:.2f} x")


if __name__ == "__main__":
    main()
