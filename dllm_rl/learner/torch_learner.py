"""The learner on plain torch: one process, CPU or one GPU.

Graphs do not grow with the number of draws. A loss is a function of l = sum_k weight_k log p_k, of the log p_k
themselves if the algorithm needs draws, and of the choices of an unmasking policy if one is trained. Its gradient is
taken in two phases (exact, one micro-batch's graph alive at a time):

    1. all of them without a graph;  c = dLoss/dl (N, L),  c_k = dLoss/dlog p_k (K, N, L),  element-wise
    2. for each micro-batch of (draw, row) pairs: backward of  sum (c * weight_k + c_k) * log p_k

When everything fits one micro-batch, phase 1 keeps its graph and phase 2 disappears.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dllm_rl import seeding
from dllm_rl.config.cluster import LearnerSection
from dllm_rl.diffusion import surrogate
from dllm_rl.errors import RunStopped, UserError, memory_for
from dllm_rl.learner.minibatches import split
from dllm_rl.learner.model_scorer import ModelScorer
from dllm_rl.learner.optimizer import Optimizer
from dllm_rl.learner.policy_scorer import PolicyScorer
from dllm_rl.learner.scorer import Scorer, join_names
from dllm_rl.learner.value_model import ValueModel
from dllm_rl.models.denoiser import TransformersDenoiser
from dllm_rl.models.digest import digest
from dllm_rl.models.evaluating import has_dropout
from dllm_rl.models.teacher import Teacher
from dllm_rl.protocols.algorithm import Algorithm, Needs, ValueBaseline
from dllm_rl.types import (
    Experience,
    GlobalCounts,
    LikelihoodEstimate,
    Loss,
    MaskSample,
    Minibatch,
    RolloutBatch,
    Sampling,
    TrainingBatch,
    WeightsVersion,
)

REFERENCE = "reference.pt"


class NonFiniteError(RunStopped):
    """The loss or the gradient is NaN or infinite; the batch has been written to disk."""


class TorchLearner:
    """Owns the trained weights, of the model, of an unmasking policy or of both, and the optimiser.

    Attributes:
        step: finished optimiser steps (batches).
    """

    _model_scorer: ClassVar[type[ModelScorer]] = ModelScorer

    def __init__(
        self,
        denoiser: TransformersDenoiser,
        tokenizer: Any,
        config: LearnerSection,
        needs: Needs,
        *,
        total_steps: int,
        seed: int,
        policy: PolicyScorer | None = None,
        teacher: Teacher | None = None,
        dump_folder: Path,
    ) -> None:
        """Take over a denoiser, a policy, or both.

        Args:
            denoiser: trained in place if the model is; engines in this process share it.
            tokenizer: saved beside the weights.
            config: optimiser settings.
            needs: of the algorithm: whether a reference is held, a value model is trained beside the model, and the
                model itself is trained.
            total_steps: length of the run, for the schedule.
            seed: run seed, for dropout.
            policy: scores with the unmasking policy that is trained, if one is.
            teacher: the reference, if the algorithm needs one and it is not the model at the start.
            dump_folder: where the batch of a non-finite loss goes.
        """
        self.denoiser, self.step = denoiser, 0
        self._config, self._seed, self._dump_folder = config, seed, dump_folder
        self._needs_reference = needs.reference
        self._model: ModelScorer | None = None
        self._scorers: dict[str, Scorer] = {}  # by the folder of its weights
        trains_model, budget = "model" in needs.trains, config.tokens_per_microbatch
        if trains_model:
            reference = config.reference if needs.reference and teacher is None else None
            self._model = self._model_scorer(denoiser, tokenizer, budget, reference=reference, seed=seed)
            if teacher is not None:
                self._model.hold(teacher)
            self._scorers["model"] = self._model
        if policy is not None:
            self._scorers["policy" if trains_model else "model"] = policy
        model = None if self._model is None else self._model.trained
        self._trained = join_names(model, None if policy is None else policy.trained)
        self._values = ValueModel(denoiser, config, total_steps, seed=seed) if needs.values else None
        self._optimizer = self._make_optimizer(total_steps)
        self._drops = trains_model and has_dropout(denoiser.module)

    def _make_optimizer(self, total_steps: int) -> Optimizer:
        return Optimizer([p for _, p in self._trained], self._config, total_steps, seed=self._seed)

    @property
    def ticks(self) -> int:
        """Micro-batches so far; a sign of life."""
        return sum(scorer.ticks for scorer in self._scorers.values())

    def score(
        self,
        batch: RolloutBatch,
        masks: MaskSample,
        *,
        reference: bool = False,
        draws: bool = False,
        sampling: Sampling | None = None,
    ) -> LikelihoodEstimate:
        """Likelihoods without gradient under the current weights, or the reference; see protocols.Learner."""
        if reference:
            assert self._model is not None, "an unmasking policy is trained from scratch: it has no reference"
            return self._model.reference(batch, masks, draws=draws)
        if sampling is not None:
            assert self._model is not None, "build_run() refuses corrections of an unmasking policy"
            return self._model.drawn(batch, masks, sampling)
        with torch.no_grad():
            return self._scored(batch, masks, self._plans(batch, masks), draws=draws)

    def update(self, training: TrainingBatch, algorithm: Algorithm) -> dict[str, float]:
        """updates_per_step passes over one batch, an optimiser update per minibatch; the old policy is what enters.

        Returns:
            metrics of the last pass, means over its minibatches.
        Raises:
            NonFiniteError: non-finite loss or gradient; weights are those before the update, the batch is on disk.
        """
        passes, needs, batch = self._config.updates_per_step, algorithm.needs, training.batch
        assert len(training.masks) in (1, passes), f"{len(training.masks)} entries of masks for {passes} updates"
        parts = training.minibatches or [
            Minibatch(rows, GlobalCounts.of(batch.select(rows))) for rows in split(batch, self._config.minibatches)
        ]
        seeding.seed_everything(seeding.derive(self._seed, "update", self.step))  # dropout of adapters
        lr = self._optimizer.start(self.step)
        known = self._known(training, needs, alone=len(parts) == 1)
        targets = self._credit(known, algorithm)
        metrics: dict[str, float] = {}
        for update in range(passes):
            number, metrics = update % len(known), {}
            for part in parts:
                experience = known[number] if len(parts) == 1 else known[number].select(part.rows, part.counts)
                experience = dataclasses.replace(experience, counts=part.counts)
                found, experience = self._update_once(experience, algorithm, first=update == 0 and len(parts) == 1)
                if len(parts) == 1:
                    known[number] = experience  # with the old policy, if it had not been scored before
                if targets:
                    assert self._values is not None and isinstance(algorithm, ValueBaseline), "see _credit"
                    old, wanted = (value[part.rows] for value in targets[number])
                    clip = algorithm.value_clip
                    found["value_loss"] = self._values.update(
                        experience.batch, experience.masks, old, wanted, clip=clip
                    )
                metrics = {name: metrics.get(name, 0.0) + value / len(parts) for name, value in found.items()}
        self.step += 1
        return {**metrics, "lr": lr}

    def _known(self, training: TrainingBatch, needs: Needs, *, alone: bool) -> list[Experience]:
        """What is known of the batch under each of its draws before the first update.

        Args:
            training: the batch.
            needs: of the algorithm.
            alone: the first update is on the whole batch, scores its own draws under the same weights and is old then.
        """
        batch, reference = training.batch, training.reference
        return [
            Experience(
                batch=batch,
                rewards=training.rewards,
                advantage=training.advantage,
                masks=drawn,
                old=LikelihoodEstimate.blank(batch)
                if not needs.old or (alone and not number)
                else self.score(batch, drawn, draws=needs.draws),
                reference=None if reference is None else reference[number],
                counts=GlobalCounts.of(batch),
                entropy=self._model.entropy(batch, drawn) if needs.entropy and self._model is not None else None,
            )
            for number, drawn in enumerate(training.masks)
        ]

    def _credit(self, known: list[Experience], algorithm: Algorithm) -> list[tuple[Tensor, Tensor]]:
        """Puts in the advantages that a value model gives; its (predictions, targets) for each draw, else nothing."""
        if not algorithm.needs.values:
            return []
        assert self._values is not None and isinstance(algorithm, ValueBaseline), "build_run() sees to it"
        self._values.start(self.step)
        targets = []
        for number, experience in enumerate(known):
            value = self._values.predict(experience.batch, experience.masks)
            credit, target = algorithm.credit(experience.rewards, experience.batch, value)
            known[number] = dataclasses.replace(experience, advantage=credit)
            targets.append((value, target))
        return targets

    def _update_once(
        self, experience: Experience, algorithm: Algorithm, *, first: bool
    ) -> tuple[dict[str, float], Experience]:
        """One optimiser update; its metrics, and the experience with the old policy if the update was the first."""
        batch, masks = experience.batch, experience.masks
        self._optimizer.zero_grad()
        plans = self._plans(batch, masks)
        # The graph fits: keep it rather than compute it twice. Not with dropout: what the loss is computed from would
        # be another network's than old and reference, and differ with the number of micro-batches.
        alive = not self._drops and all(len(work) == 1 for work in plans)
        with torch.set_grad_enabled(alive):
            new = self._scored(batch, masks, plans, draws=algorithm.needs.draws)
        if first:
            own = {name: value.detach().clone() for name, value in new.differentiable.items()}
            experience = dataclasses.replace(experience, old=dataclasses.replace(new, **own))
        if not alive:
            leaves = {name: value.requires_grad_() for name, value in new.differentiable.items()}
        idle = experience.counts.idle
        loss = Loss(0.0 * new.token_logp.sum()) if idle else algorithm.loss(new, experience)
        found = self._over_ranks({"loss": loss.value.detach(), **loss.metrics})
        self._require_finite("loss", found["loss"], experience)
        if alive:
            self._optimizer.backward(loss.value, last=True)
        else:
            slopes = torch.autograd.grad(loss.value, list(leaves.values()), materialize_grads=True)
            self._second_phase(experience, dataclasses.replace(new, **dict(zip(leaves, slopes, strict=True))))
        check = functools.partial(self._require_finite, "gradient norm", experience=experience)
        with memory_for("optimiser step"):  # the first one makes the moments
            norm = self._optimizer.step(check)
        if self._model is not None and self._model.moving is not None:
            self._model.moving.updated(self.reading)  # for the next batch: this one has its scores already
        metrics = surrogate.derived_metrics({name: scalar.item() for name, scalar in found.items()})
        return {"grad_norm": norm.item(), **metrics}, experience

    def forget_gradients(self) -> None:
        """Free them: nobody reads them after an update, and decoding in the same process has use for the room."""
        self._optimizer.zero_grad()
        if self._values is not None:
            self._values.forget_gradients()

    def reference_digest(self) -> str:
        """Digest of the frozen reference's weights; empty if only a policy is trained."""
        return "" if self._model is None else self._model.reference_digest()

    def drop_reference(self) -> None:
        """Free the frozen reference."""
        if self._model is not None:
            self._model.drop_reference()

    def skip(self) -> dict[str, float]:
        """A step from which the algorithm kept no row: counted, weights untouched, no metrics."""
        self.step += 1
        return {}

    def version(self) -> WeightsVersion:
        """The step and a digest of the trained weights."""
        return WeightsVersion(step=self.step, digest=digest(self._trained))

    def named_weights(self) -> Iterable[tuple[str, nn.Parameter]]:
        """Trained weights by module name; the policy's begin with "policy." if the model is trained too."""
        return iter(self._trained)

    def save(self, folder: Path) -> None:
        """Weights below folder/model (of a policy beside the model: folder/policy), the rest in files of the folder."""
        for name, scorer in self._scorers.items():
            scorer.save(folder / name)
        torch.save({"step": self.step, "optimizer": self._optimizer.state_dict()}, folder / "optimizer.pt")
        if self._values is not None:
            torch.save(self._values.state_dict(), folder / "values.pt")
        self._save_reference(folder, writes=True)

    def load(self, folder: Path) -> None:
        """Restore what save wrote, bit for bit."""
        for name, scorer in self._scorers.items():
            scorer.load(folder / name)
        state = torch.load(folder / "optimizer.pt", weights_only=True, map_location="cpu")
        self._optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]
        if self._values is not None:
            self._values.load_state_dict(torch.load(folder / "values.pt", weights_only=True, map_location="cpu"))
        self._load_reference(folder)

    def _save_reference(self, folder: Path, *, writes: bool) -> None:
        """Write a reference that moves into folder/reference.pt; one that is frozen is the start of the run."""
        if self._model is not None and self._model.moving is not None:
            self._model.moving.save(folder / REFERENCE, self.reading, writes=writes)

    def _load_reference(self, folder: Path) -> None:
        """Restore it. A run whose reference was frozen so far goes on from there.

        Raises:
            UserError: the reference has moved, and is to be frozen now.
        """
        if self._model is None or not self._needs_reference or not (folder / REFERENCE).is_file():
            return
        if self._model.moving is None:
            raise UserError(
                f"checkpoint '{folder}' holds a reference that has moved, and learner.reference.kind: frozen is the "
                f"start of the run; set kind: ema (with every: 1000000 it stays where it is)"
            )
        self._model.moving.load(folder / REFERENCE, self.reading)

    @contextlib.contextmanager
    def reading(self, parameters: Sequence[nn.Parameter], *, writing: bool = False) -> Iterator[None]:
        """Inside, parameters are whole; with ``writing``, rank 0's changes stay. All ranks enter together."""
        yield

    def _plans(self, batch: RolloutBatch, masks: MaskSample) -> list[Sequence[Any]]:
        return [scorer.plan(batch, masks) for scorer in self._scorers.values()]

    def _scored(
        self, batch: RolloutBatch, masks: MaskSample, plans: Sequence[Sequence[Any]], *, draws: bool
    ) -> LikelihoodEstimate:
        estimate = LikelihoodEstimate.blank(batch)
        for scorer, work in zip(self._scorers.values(), plans, strict=True):
            estimate = scorer.add(estimate, batch, masks, work, draws=draws)
        return estimate

    def _second_phase(self, experience: Experience, slope: LikelihoodEstimate) -> None:
        batch, masks = experience.batch, experience.masks
        shares = [share for scorer in self._scorers.values() for share in scorer.shares(batch, masks, slope)]
        for number, share in enumerate(shares, start=1):
            self._optimizer.backward(share(), last=number == len(shares))

    def _over_ranks(self, scalars: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Sums over ranks: losses and their metrics are shares of the global batch's."""
        return scalars

    def _require_finite(self, what: str, value: Tensor, experience: Experience) -> None:
        if bool(torch.isfinite(value)):
            return
        path = self._dump_folder / f"non-finite-step-{self.step:06d}.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(dataclasses.asdict(experience), path)
        raise NonFiniteError(
            f"{what} is {value.item()} at step {self.step}; stopped before the update, the batch is in {path}. "
            f"Lower learner.lr or learner.max_grad_norm, or resume from the last checkpoint"
        )
