"""Records of a run: clocks, progress without a terminal, the picture, declared metrics."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from dllm_rl.cli import progress as cli_progress
from dllm_rl.cli.progress import RichProgress
from dllm_rl.reports.clock import Clock
from dllm_rl.reports.metrics import METRICS, describe
from dllm_rl.reports.plot import plot_run
from dllm_rl.reports.run_folder import RunFolder

ROWS = [
    *({"step": step, "reward": step / 40, "loss": 0.1} for step in range(1, 41)),
    *(
        {
            "step": step,
            f"eval/{speed}_per_step/success": step / 50 / speed,
            f"eval/{speed}_per_step/success_low": step / 50 / speed - 0.02,
            f"eval/{speed}_per_step/success_high": step / 50 / speed + 0.03,
        }
        for step in (0, 20, 40)
        for speed in (1, 4)
    ),
]


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_the_picture_shows_training_and_every_speed(tmp_path, kind):
    path = tmp_path / f"plot.{kind}"
    plot_run(ROWS, path, title="a run")
    if kind == "svg":
        text = path.read_text()
        assert text.count("LineCollection") >= 2, "no error bars"
        assert len(text) > 20_000
        return
    from matplotlib.image import imread

    pixels = imread(path)
    assert pixels.shape[0] > 400 and pixels.shape[1] > 1000
    colours = {tuple(int(255 * c) for c in pixel[:3]) for pixel in pixels[::3, ::3].reshape(-1, pixels.shape[2])}
    assert {(43, 108, 176), (31, 119, 180), (255, 127, 14)} <= colours, "the reward and the two speeds have colours"


@pytest.mark.parametrize("rows", [[], ROWS[:1], ROWS[-1:], [{"step": 1, "loss": 0.3}, {"step": 2, "loss": 0.2}]])
def test_short_runs_have_a_picture_too(tmp_path, rows):
    plot_run(rows, tmp_path / "plot.png", title="short")
    assert (tmp_path / "plot.png").stat().st_size > 5_000


def test_every_metric_has_a_meaning():
    assert all(metric.meaning for metric in METRICS.values())
    assert describe("eval/4_per_step/success").unit == "share" and describe("reward/sudoku").meaning
    for name in ("rewrad", "other/x"):
        with pytest.raises(KeyError, match="not declared"):
            describe(name)


def test_undeclared_metrics_are_refused(tmp_path):
    with pytest.raises(KeyError, match="not declared"):
        RunFolder(tmp_path / "run").log(1, {"nonsense": 1.0})


def test_a_record_cut_off_by_a_kill_goes_on(tmp_path):
    run = RunFolder(tmp_path)
    for step in (1, 2, 3):
        run.log(step, {"reward": float(step)})
        run.log_samples(step, [{"text": "é"}])
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text()[:-10])
    assert [row["step"] for row in run.metrics()] == [1, 2]
    run.rewind(None, 1)
    run.log(2, {"reward": 9.0})
    assert [(row["step"], row["reward"]) for row in run.metrics()] == [(1, 1.0), (2, 9.0)]
    assert [json.loads(line)["step"] for line in (tmp_path / "samples.jsonl").read_text().splitlines()] == [1]
    path.write_text('{"step": 1\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 1: not JSON"):
        run.metrics()


def test_clocks_add_up(monkeypatch):
    now = iter([0.0, 2.0, 10.0, 13.0])
    monkeypatch.setattr("dllm_rl.reports.clock.time.perf_counter", lambda: next(now))
    clock, other = Clock(), Clock()
    with clock("a_s"):
        pass
    with other("a_s"):
        pass
    clock.add(other)
    assert clock.seconds == {"a_s": 5.0}


def test_progress_without_a_terminal_says_now_and_then_how_long_it_takes(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(cli_progress.time, "monotonic", lambda: now[0])
    out = io.StringIO()
    progress = RichProgress(Console(file=out, force_terminal=False, width=100))
    with progress.track("training", 100) as advance:
        for _ in range(50):
            now[0] += 1.0
            advance(1, "reward 0.5")
    lines = out.getvalue().splitlines()
    assert lines[0] == "training 10/100, eta 90 s reward 0.5" and len(lines) == 5


def test_progress_on_a_terminal_shows_a_bar(monkeypatch):
    out = io.StringIO()
    progress = RichProgress(Console(file=out, force_terminal=True, width=100))
    with progress.track("training", 4) as advance:
        advance(1, "")
        advance(2, "loss 0.1")
        progress.log("half-way")
    text = out.getvalue()
    assert "training" in text and "3/4" in text and "eta" in text and "loss 0.1" in text and "half-way" in text
