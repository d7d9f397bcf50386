"""Steps that teach nothing: no row judged, all None, flat groups, empty completions. Runs survive."""

from __future__ import annotations

import math

import pytest

from dllm_rl.reports.progress import Quiet
from dllm_rl.reports.run_folder import comparable
from dllm_rl.train import train

REWARDS = """
def none(prompts, completions, **columns):
    return [None] * len(completions)


def raises(prompts, completions, **columns):
    raise RuntimeError("no verdict")


def flat(prompts, completions, **columns):
    return [1.0] * len(completions)
"""
LOCAL = (
    "cluster.kind=local",
    "cluster.engines=1",
    "run.steps=2",
    "data.prompts_per_step=2",
    "data.task.train_puzzles=8",
    "data.task.test_puzzles=2",
    "reward_pool={workers: 1, self_test: 0, max_failure_fraction: 1.0}",
    "diagnostics.every_steps=1",
)
POLICY = ("sampling={max_new_tokens: 16, temperature: 0, tokens_per_step: 1, strategy: {name: learned, width: 16}}",)
METHODS = {
    "group-relative": ("algorithm={name: coupled_grpo, beta: 0.01}",),
    "value model": ("algorithm={name: trace_rl, value: true}",),
    "policy of positions": ("algorithm={name: unmasking_policy}", *POLICY),
    "extra rollouts": ("algorithm={name: mdpo}",),
    "resampled and decoupled": (
        "algorithm={name: espo}",
        "reward_normalisation=decoupled",
        "data.resample_flat_groups=1",
    ),
}
EMPTY = "model.end_tokens=[0, 3, 4, 5, 6, 7, 8]"  # whatever is generated first ends the row


class Lines(Quiet):
    def __init__(self):
        self.lines = []

    def log(self, text):
        self.lines.append(text)


@pytest.fixture
def rewards(tmp_path, monkeypatch):
    (tmp_path / "poor_rewards.py").write_text(REWARDS)
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.mark.parametrize("kind", ["none", "raises", "flat", "empty"])
@pytest.mark.parametrize("method", METHODS)
def test_a_run_of_steps_that_teach_nothing(rewards, tiny, method, kind):
    changes = (
        [EMPTY] if kind == "empty" else [f"rewards=[{{name: sudoku, weight: 0}}, {{name: 'poor_rewards:{kind}'}}]"]
    )
    lines = Lines()
    summary = train(tiny(*LOCAL, *METHODS[method], *changes), progress=lines)
    rows = comparable(summary.folder)
    odd = {name for row in rows for name, value in row.items() if isinstance(value, float) and not math.isfinite(value)}
    assert summary.steps == 2 and not odd
    assert (summary.folder / "checkpoints" / "step-000002").is_dir()
    steps = [row for row in rows if "kept_rows" in row]
    if kind == "raises":
        assert [row["failed_rows"] for row in steps] == [1.0, 1.0] and "reward" not in steps[0]
        assert [
            line for line in lines.lines if "held-out evaluation is left out: no completion could be scored" in line
        ]
    if kind == "flat":
        assert all(row["zero_variance_groups"] == 1.0 for row in steps)
    if kind == "empty":
        assert all(row["completion_tokens"] == 1.0 for row in steps)
