"""dllm-rl draws: how noisy a likelihood estimate is, for more and more forwards, beside what it has to resolve."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.table import Table

from dllm_rl import seeding
from dllm_rl.cli.output import stdout, write_json
from dllm_rl.config.plugins import build
from dllm_rl.config.schema import Config
from dllm_rl.diffusion.advantage import per_row
from dllm_rl.driver.build import Run, build_run
from dllm_rl.driver.collect import demonstrate, roll_out
from dllm_rl.driver.step_masks import reference_masks, step_masks
from dllm_rl.errors import UserError
from dllm_rl.learner.diagnostics import redrawn
from dllm_rl.protocols.algorithm import Algorithm
from dllm_rl.reports.clock import Clock
from dllm_rl.reports.plot import plot_curves
from dllm_rl.reports.progress import Progress
from dllm_rl.types import Rewards, RolloutBatch, TrainingBatch

_KNOBS = ("pairs", "draws", "nodes")  # what the algorithms here call it
_VALUES = {"nodes": [1, 2, 3, 4, 5]}


def run_draws(
    config: Config,
    vary: str | None,
    *,
    rows: int,
    redraws: int,
    plot: Path | None,
    json_path: Path | None,
    progress: Progress,
) -> None:
    """Measure, print, and write if asked.

    One batch is collected and one update is made at the configured learning rate. For each setting, every row is scored
    before and after it under the same draws, as in training, and again under fresh ones.

    Args:
        config: of a run; its model is looked at as it is.
        vary: "option=v,v,..." of the algorithm; None = its number of draws.
        rows: completions to look at.
        redraws: independent draws of all masks.
        plot: picture to write.
        json_path: file to write.
        progress: where to show progress.
    Raises:
        UserError: an algorithm without likelihoods, or an option that it does not have.
    """
    algorithm: Algorithm = build("algorithms", config.algorithm.name, config.algorithm.options)
    if "model" not in algorithm.needs.trains:
        raise UserError(f"algorithm '{config.algorithm.name}' scores choices exactly: there is nothing to draw")
    option, values = _varied(config, vary, type(algorithm))
    candidates = [
        build("algorithms", config.algorithm.name, config.algorithm.options | ({option: value} if option else {}))
        for value in values
    ]
    with contextlib.ExitStack() as stack:
        scratch = stack.enter_context(tempfile.TemporaryDirectory())
        advance = stack.enter_context(progress.track("scoring", 2 * len(values)))
        run = stack.enter_context(build_run(config, Path(scratch), progress))
        run.weights.push()
        whole, rewards = _collect(run, config)
        advantage = run.algorithm.advantages(rewards, whole)
        batch = _informative(whole, advantage, rows)
        seeds = [seeding.derive(config.run.seed, "draws", number) for number in range(redraws)]
        before = []
        for candidate in candidates:
            before.append(redrawn(run.learner, candidate, batch, seeds=seeds))
            advance(1, "")
        _update(run, config, whole, rewards, advantage)
        results: list[dict[str, Any]] = []
        for value, candidate, old in zip(values, candidates, before, strict=True):
            ratio = redrawn(run.learner, candidate, batch, seeds=seeds) - old
            forwards = len(candidate.masks(batch, seeding.generator_for(0)).mask)
            results.append(_row(value, forwards, old, ratio))
            advance(1, "")
    _show(option, results)
    write_json(json_path, {"algorithm": config.algorithm.name, "option": option, "rows": rows, "curve": results})
    if plot is not None:
        curves = {
            "log-likelihood": [(r["forwards"], r["likelihood_noise"]) for r in results],
            "log-ratio, shared draws": [(r["forwards"], r["ratio_noise"]) for r in results],
            "log-ratio, its spread over rows": [(r["forwards"], r["ratio_signal"]) for r in results],
        }
        plot_curves(curves, plot, title=f"{config.algorithm.name}: noise, nats", x="forwards per likelihood")
        print(f"plot: {plot}")


def _varied(config: Config, vary: str | None, kind: type[Algorithm]) -> tuple[str | None, list[Any]]:
    known = [field.name for field in fields(kind.Config)]
    if vary is None:
        option = next((name for name in _KNOBS if name in known), None)
        return option, _VALUES.get(option or "", [1, 2, 4, 8, 16]) if option else [None]
    option, equals, text = vary.partition("=")
    if not equals or not text:
        raise UserError(f"--vary {vary}: write option=value,value,...")
    if option not in known:
        raise UserError(f"--vary {vary}: algorithm '{config.algorithm.name}' has the options {', '.join(known)}")
    return option, [yaml.safe_load(value) for value in text.split(",")]


def _collect(run: Run, config: Config) -> tuple[RolloutBatch, Rewards]:
    prompts = run.source.batch(0)
    if run.algorithm.needs.source != "rollouts":
        found = demonstrate(run, prompts)
    else:
        assert run.reward_pool is not None, "build_run() refuses rollouts without rewards"
        with run.reward_pool:
            found = roll_out(run, config, prompts, 0, Clock())
    return found.batch, found.rewards


def _informative(batch: RolloutBatch, advantage: torch.Tensor, rows: int) -> RolloutBatch:
    """The first rows that the update learns from: only their ratios matter."""
    few = per_row(advantage.abs()).nonzero().flatten()[: rows // 2 * 2]  # pairs stay whole
    if len(few) < 2:
        raise UserError(
            f"{len(few)} of {len(batch)} completions of the first batch have an advantage, so there is no update to "
            f"look at; raise data.prompts_per_step, or start from a model that solves some"
        )
    return batch.select(few)


def _update(run: Run, config: Config, batch: RolloutBatch, rewards: Rewards, advantage: torch.Tensor) -> None:
    masks, needs = step_masks(run.algorithm, batch, config, 0), run.algorithm.needs
    reference = None
    if needs.reference:
        seen = reference_masks(run.algorithm, batch, masks, config, 0)
        reference = [run.learner.score(batch, drawn, reference=True, draws=needs.draws) for drawn in seen]
    run.learner.update(TrainingBatch(batch, rewards, advantage, masks, reference), run.algorithm)


def _row(value: Any, forwards: int, old: torch.Tensor, ratio: torch.Tensor) -> dict[str, Any]:
    noise, signal = ratio.var(0).mean().sqrt().item(), ratio.mean(0).std().item()
    return {
        "value": value,
        "forwards": forwards,
        "likelihood_noise": old.var(0).mean().sqrt().item(),
        "ratio_noise": noise,
        "ratio_signal": signal,
        "signal_to_noise": None if noise == 0 else signal / noise,
    }


def _show(option: str | None, results: Sequence[dict[str, Any]]) -> None:
    table = Table(title="deviation over fresh draws, nats per completion")
    for name in (
        option or "setting",
        "forwards",
        "log-likelihood",
        "log-ratio",
        "log-ratio over rows",
        "signal : noise",
    ):
        table.add_column(name, justify="right")
    for r in results:
        ratio = "exact" if r["signal_to_noise"] is None else f"{r['signal_to_noise']:.2f}"
        figures = [f"{r[name]:.4g}" for name in ("likelihood_noise", "ratio_noise", "ratio_signal")]
        table.add_row(str(r["value"] if option else "as configured"), str(r["forwards"]), *figures, ratio)
    stdout().print(table)
