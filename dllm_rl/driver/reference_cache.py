"""Likelihoods under the reference: scored when they are needed, or kept on disk so that a frozen one can go.

The draws of a step are a pure function of the run seed and the step. For data that is there from the start (pairs,
demonstrations) every reference score can therefore be computed before training; files are named by what they hold
(weights, tokens, draws), so that another run over the same data and seed finds them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from dllm_rl.config.schema import Config
from dllm_rl.driver.build import Run
from dllm_rl.driver.collect import demonstrate
from dllm_rl.driver.step_masks import reference_masks, step_masks
from dllm_rl.reports.progress import Progress, each
from dllm_rl.types import LikelihoodEstimate, MaskSample, RolloutBatch


class ReferenceCache:
    """Where a step gets its reference likelihoods from."""

    def __init__(self, run: Run, config: Config, folder: Path) -> None:
        """Look at the configuration; compute nothing yet.

        Args:
            run: its parts.
            config: of the run; learner.precompute_reference and learner.reference_cache decide.
            folder: the run folder; the cache is its ``reference`` folder unless the configuration names another.
        """
        self._run, self._config = run, config
        self._needed, self._draws = run.algorithm.needs.reference, run.algorithm.needs.draws
        self._cached = self._needed and config.learner.precompute_reference
        self._folder = Path(config.learner.reference_cache or folder / "reference")
        self._weights = run.learner.reference_digest() if self._cached else ""

    def prepare(self, first: int, total: int, progress: Progress) -> None:
        """Score every step that is not in the cache, then free the reference.

        Args:
            first: the step that training goes on with.
            total: steps of the run.
            progress: where to show progress.
        """
        if not self._cached:
            return
        run = self._run
        for step in each(progress, "reference", range(first, total)):
            batch = demonstrate(run, run.source.batch(step)).batch
            drawn = step_masks(run.algorithm, batch, self._config, step)
            for masks in reference_masks(run.algorithm, batch, drawn, self._config, step):
                path = self._path(batch, masks)
                if not path.exists():
                    estimate = self._score(batch, masks)
                    path.parent.mkdir(parents=True, exist_ok=True)
                    half = path.with_suffix(".part")
                    torch.save(estimate.differentiable, half)
                    half.replace(path)  # whole or not there
        run.learner.drop_reference()

    def of(self, batch: RolloutBatch, masks: Sequence[MaskSample]) -> list[LikelihoodEstimate] | None:
        """The reference likelihoods of a batch under each of its draws, or None if the algorithm needs none.

        A reference that moves is scored as it is now, before the first update on the batch; what it moves to during
        the step is for the next one.
        """
        if not self._needed:
            return None
        if not self._cached:
            return [self._score(batch, drawn) for drawn in masks]
        paths = [self._path(batch, drawn) for drawn in masks]
        return [LikelihoodEstimate(**torch.load(path, weights_only=True)) for path in paths]

    def _score(self, batch: RolloutBatch, masks: MaskSample) -> LikelihoodEstimate:
        return self._run.learner.score(batch, masks, reference=True, draws=self._draws)

    def _path(self, batch: RolloutBatch, masks: MaskSample) -> Path:
        made = hashlib.blake2b((self._weights + "draws" * self._draws).encode(), digest_size=16)
        for value in (batch.tokens, batch.completion, masks.mask, masks.weight):
            made.update(repr(tuple(value.shape)).encode())
            made.update(_bytes(value))
        return self._folder / f"{made.hexdigest()}.pt"


def _bytes(value: Tensor) -> memoryview:
    return value.contiguous().cpu().view(-1).view(torch.uint8).numpy().data
