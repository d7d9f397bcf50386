"""The picture of a run: reward and held-out success over steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_INK = "#1f2430"


def plot_run(rows: Sequence[Mapping[str, Any]], path: Path, *, title: str) -> None:
    """Draw reward (or loss, for supervised runs) and held-out success with its interval.

    Args:
        rows: metrics.jsonl.
        path: .png or .svg.
        title: shown above.
    """
    # Imported here: matplotlib takes a second, and only the end of a run needs it.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    train_metric = "reward" if any("reward" in row for row in rows) else "loss"
    points = [(row["step"], row[train_metric]) for row in rows if train_metric in row]
    left.plot(*zip(*points, strict=True), color="#9aa5b8", linewidth=0.8) if points else None
    smooth = _smoothed(points)
    left.plot(*zip(*smooth, strict=True), color="#2b6cb0", linewidth=1.8) if smooth else None
    losses = [(row["step"], row["eval/loss"]) for row in rows if "eval/loss" in row and train_metric == "loss"]
    if losses:
        left.plot(*zip(*losses, strict=True), "o-", color="#c05621", markersize=4, label="held out")
        left.legend(frameon=False)
    left.set(xlabel="step", title=f"training {train_metric}")
    for number, speed in enumerate(_speeds(rows)):
        prefix = f"eval/{speed}"
        held = [row for row in rows if f"{prefix}/success" in row]
        steps = [row["step"] for row in held]
        mean = [row[f"{prefix}/success"] for row in held]
        below = [m - row[f"{prefix}/success_low"] for m, row in zip(mean, held, strict=True)]
        above = [row[f"{prefix}/success_high"] - m for m, row in zip(mean, held, strict=True)]
        right.errorbar(
            steps,
            mean,
            yerr=[below, above],
            marker="o",
            markersize=4,
            capsize=3,
            label=_label(speed),
            color=f"C{number}",
        )
    right.set(xlabel="step", title="held-out success, 95% interval", ylim=(-0.02, 1.02))
    if right.has_data():
        right.legend(frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=_INK)
        axes.grid(alpha=0.25, linewidth=0.6)
    figure.suptitle(title, color=_INK)
    figure.savefig(path, dpi=150)


def _smoothed(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Running mean over a tenth of the run."""
    width = max(1, len(points) // 10)
    values = [value for _, value in points]
    return [
        (points[i][0], sum(values[max(0, i - width + 1) : i + 1]) / (i + 1 - max(0, i - width + 1)))
        for i in range(len(points))
    ]


def _speeds(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    names = {name.split("/")[1] for row in rows for name in row if name.endswith("_per_step/success")}
    return sorted(names, key=lambda name: int(name.split("_")[0]))


def _label(speed: str) -> str:
    count = speed.split("_")[0]
    return f"{count} token{'s' if count != '1' else ''} per forward"


def plot_curves(curves: Mapping[str, Sequence[tuple[float, float]]], path: Path, *, title: str, x: str) -> None:
    """Draw named curves on logarithmic axes.

    Args:
        curves: label -> points; a curve with a value of 0 is left out, since it has no logarithm.
        path: .png or .svg.
        title: shown above.
        x: label of the horizontal axis.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for label, points in curves.items():
        if points and all(y > 0 for _, y in points):
            axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=label)
    axes.set(xscale="log", yscale="log", xlabel=x)
    ticks = sorted({point[0] for points in curves.values() for point in points})
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0)) if axes.lines else None
    axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, color=_INK)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
