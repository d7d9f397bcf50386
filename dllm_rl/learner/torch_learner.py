"""The learner on plain torch: one process, CPU or one GPU.

Memory does not grow with the number of draws. A loss is a function of l = sum_k weight_k log p_k, so its gradient is
taken in two phases (exact, one micro-batch's graph alive at a time):

    1. l without a graph;  c = dLoss/dl, element-wise (N, L)
    2. for each micro-batch of (draw, row) pairs: backward of  sum c * weight * log p

When everything fits one micro-batch, phase 1 keeps its graph and phase 2 disappears.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dllm_rl import seeding
from dllm_rl.config.cluster import LearnerSection
from dllm_rl.diffusion import likelihood, surrogate
from dllm_rl.errors import RunStopped, UserError
from dllm_rl.learner.optimizer import Optimizer
from dllm_rl.learner.value_model import ValueModel
from dllm_rl.models.denoiser import TransformersDenoiser
from dllm_rl.models.digest import digest
from dllm_rl.models.loading import load_denoiser, save_denoiser
from dllm_rl.models.lora import load_adapter, reference_weights, save_adapter
from dllm_rl.protocols.algorithm import Algorithm
from dllm_rl.types import (
    Experience,
    GlobalCounts,
    LikelihoodEstimate,
    Loss,
    MaskSample,
    Rewards,
    RolloutBatch,
    WeightsVersion,
)

Scored = tuple[Tensor, Tensor, Tensor]
Scoring = Callable[..., Scored]  # likelihood.score or likelihood.entropy


class NonFiniteError(RunStopped):
    """The loss or the gradient is NaN or infinite; the batch has been written to disk."""


class TorchLearner:
    """Owns the trained weights and the optimiser.

    Attributes:
        step: finished optimiser steps (batches).
        ticks: micro-batches so far; a sign of life.
    """

    def __init__(
        self,
        denoiser: TransformersDenoiser,
        tokenizer: Any,
        config: LearnerSection,
        *,
        total_steps: int,
        seed: int,
        keep_reference: bool,
        keep_values: bool = False,
        dump_folder: Path,
    ) -> None:
        """Take over a denoiser.

        Args:
            denoiser: trained in place; engines in this process share it.
            tokenizer: saved beside the weights.
            config: optimiser settings.
            total_steps: length of the run, for the schedule.
            seed: run seed, for dropout.
            keep_reference: hold a frozen copy (with LoRA: the base below the adapter, which costs nothing).
            keep_values: train a value model beside it.
            dump_folder: where the batch of a non-finite loss goes.
        """
        self.denoiser = denoiser
        self.step = self.ticks = 0
        self._tokenizer = tokenizer
        self._config, self._seed, self._dump_folder = config, seed, dump_folder
        self._trained = [(n, p) for n, p in denoiser.module.named_parameters() if p.requires_grad]
        self._reference: TransformersDenoiser | None = None
        if keep_reference and denoiser.adapter is None:
            self._reference = copy.deepcopy(denoiser)
            self._reference.module.requires_grad_(False).eval()
        self._values = ValueModel(denoiser, config, total_steps) if keep_values else None
        self._optimizer = self._make_optimizer(total_steps)

    def _make_optimizer(self, total_steps: int) -> Optimizer:
        return Optimizer([p for _, p in self._trained], self._config, total_steps)

    def score(self, batch: RolloutBatch, masks: MaskSample, *, reference: bool = False) -> LikelihoodEstimate:
        """Likelihoods without gradient under the current weights, or the frozen reference."""
        if reference and self._reference is None and self.denoiser.adapter is None:
            raise RuntimeError("the learner holds no reference: it was made without one, or it has been dropped")
        forward = self._reference_forward if reference and self._reference is not None else self._forward
        below_adapter = reference and self._reference is None
        with (
            torch.no_grad(),
            _evaluating(self.denoiser),
            reference_weights(self.denoiser) if below_adapter else contextlib.nullcontext(),
        ):
            return self._summed(likelihood.score, forward, batch, masks, self._plan(batch, masks))

    def update(
        self,
        batch: RolloutBatch,
        rewards: Rewards,
        advantage: Tensor,
        masks: MaskSample,
        algorithm: Algorithm,
        *,
        reference: LikelihoodEstimate | None,
        counts: GlobalCounts | None = None,
    ) -> dict[str, float]:
        """updates_per_step optimiser updates on one batch; the old policy is the one that enters.

        Raises:
            NonFiniteError: non-finite loss or gradient; weights are those before the update, the batch is on disk.
        """
        counts = counts or GlobalCounts(num_tokens=int(batch.completion.sum()), num_rows=len(batch))
        seeding.seed_everything(seeding.derive(self._seed, "update", self.step))  # dropout of adapters
        lr = self._optimizer.start(self.step)
        metrics: dict[str, float] = {}
        old: LikelihoodEstimate | None = None
        entropy: Tensor | None = None
        if algorithm.needs_entropy:
            entropy = self._entropy(batch, masks)
        value: Tensor | None = None
        if algorithm.value_clip is not None:
            assert self._values is not None, "build_run() keeps values for algorithms that want them"
            self._values.start(self.step)
            value = self._values.predict(batch, masks)
            advantage, target = algorithm.credit(rewards, batch, value)
        for _ in range(self._config.updates_per_step):
            self._optimizer.zero_grad()
            new, alive = self._current(batch, masks)
            if old is None:
                old = LikelihoodEstimate(token_logp=new.token_logp.detach().clone(), draw_logp=new.draw_logp)
            experience = Experience(
                batch=batch,
                rewards=rewards,
                advantage=advantage,
                masks=masks,
                old=old,
                reference=reference,
                num_tokens=counts.num_tokens,
                num_rows=counts.num_rows,
                entropy=entropy,
            )
            loss = Loss(0.0 * new.token_logp.sum()) if counts.idle else algorithm.loss(new, experience)
            found = self._over_ranks({"loss": loss.value.detach(), **loss.metrics})
            self._require_finite("loss", found["loss"], experience)
            if alive:
                self._optimizer.backward(loss.value, last=True)
            else:
                self._second_phase(batch, masks, loss, new)
            check = functools.partial(self._require_finite, "gradient norm", experience=experience)
            norm = self._optimizer.step(check)
            metrics = {"grad_norm": norm.item(), "lr": lr}
            metrics |= surrogate.derived_metrics({name: scalar.item() for name, scalar in found.items()})
            if value is not None:
                assert self._values is not None and algorithm.value_clip is not None, "checked above"
                metrics["value_loss"] = self._values.update(batch, masks, value, target, clip=algorithm.value_clip)
        self.step += 1
        return metrics

    def reference_digest(self) -> str:
        """Of the frozen copy, or of the base below the adapter."""
        if self._reference is not None:
            return digest(self._reference.module.named_parameters())
        return digest((n, p) for n, p in self.denoiser.module.named_parameters() if not p.requires_grad)

    def drop_reference(self) -> None:
        """Free the frozen copy; with LoRA there is none."""
        self._reference = None

    def skip(self) -> dict[str, float]:
        """A step from which the algorithm kept no row: counted, weights untouched, no metrics."""
        self.step += 1
        return {}

    def _plan(self, batch: RolloutBatch, masks: MaskSample) -> list[likelihood.Work]:
        """Micro-batches; the same number on every rank."""
        return likelihood.plan(batch, masks, self._config.tokens_per_microbatch)

    def _forward(self, function: Scoring, batch: RolloutBatch, masks: MaskSample, work: likelihood.Work) -> Scored:
        """A function of likelihood.py on the trained network."""
        self.ticks += 1
        return function(self.denoiser, batch, masks, work)

    def _reference_forward(
        self, function: Scoring, batch: RolloutBatch, masks: MaskSample, work: likelihood.Work
    ) -> Scored:
        """The same on the frozen copy."""
        self.ticks += 1
        return function(self._reference, batch, masks, work)

    def _over_ranks(self, scalars: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Sums over ranks: losses and their metrics are shares of the global batch's."""
        return scalars

    def _summed(
        self,
        function: Scoring,
        forward: Callable[..., Scored],
        batch: RolloutBatch,
        masks: MaskSample,
        work: Sequence[likelihood.Work],
    ) -> LikelihoodEstimate:
        return likelihood.summed(batch, masks, work, functools.partial(forward, function, batch, masks))

    def _entropy(self, batch: RolloutBatch, masks: MaskSample) -> Tensor:
        """(N, L) nats at the scored positions, averaged over the draws that score them."""
        with _evaluating(self.denoiser):
            found = self._summed(likelihood.entropy, self._forward, batch, masks, self._plan(batch, masks))
        return found.token_logp / (masks.weight != 0).sum(0).clamp(min=1)

    def _current(self, batch: RolloutBatch, masks: MaskSample) -> tuple[LikelihoodEstimate, bool]:
        """The current policy's estimate, and whether its graph reaches the weights (one micro-batch) or is a leaf."""
        work = self._plan(batch, masks)
        if len(work) > 1:
            with torch.no_grad(), _evaluating(self.denoiser):
                estimate = self._summed(likelihood.score, self._forward, batch, masks, work)
            return dataclasses.replace(estimate, token_logp=estimate.token_logp.requires_grad_()), False
        self.denoiser.module.train()
        return self._summed(likelihood.score, self._forward, batch, masks, work), True

    def _second_phase(self, batch: RolloutBatch, masks: MaskSample, loss: Loss, new: LikelihoodEstimate) -> None:
        (coefficient,) = torch.autograd.grad(loss.value, new.token_logp)
        # Tokens that the loss does not depend on (zero advantage, say) are not forwarded again: their gradient is zero.
        needed = MaskSample(mask=masks.mask, weight=masks.weight * (coefficient != 0).cpu())
        self.denoiser.module.train()
        work = self._plan(batch, needed)
        for number, part in enumerate(work, start=1):
            values, pair, position = self._forward(likelihood.score, batch, needed, part)
            row = part.row.to(values.device)[pair]
            share = (values * coefficient.to(values.device)[row, position]).sum()
            self._optimizer.backward(share, last=number == len(work))

    def _require_finite(self, what: str, value: Tensor, experience: Experience) -> None:
        if bool(torch.isfinite(value)):
            return
        path = self._dump_folder / f"non-finite-step-{self.step:06d}.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        batch = {f.name: getattr(experience.batch, f.name) for f in dataclasses.fields(RolloutBatch)}
        torch.save(
            {
                "batch": batch,
                "advantage": experience.advantage,
                "mask": experience.masks.mask,
                "weight": experience.masks.weight,
                "old": experience.old.token_logp,
                "reference": None if experience.reference is None else experience.reference.token_logp,
            },
            path,
        )
        raise NonFiniteError(
            f"{what} is {value.item()} at step {self.step}; stopped before the update, the batch is in {path}. "
            f"Lower learner.lr or learner.max_grad_norm, or resume from the last checkpoint"
        )

    def version(self) -> WeightsVersion:
        """The step and a digest of the trained weights."""
        return WeightsVersion(step=self.step, digest=digest(self._trained))

    def named_weights(self) -> Iterable[tuple[str, nn.Parameter]]:
        """Trained weights by module name."""
        return iter(self._trained)

    def save(self, folder: Path) -> None:
        """Weights (or the adapter) below folder/model, optimiser state and step in folder/optimizer.pt."""
        self._save_model(folder / "model")
        torch.save({"step": self.step, "optimizer": self._optimizer.state_dict()}, folder / "optimizer.pt")
        if self._values is not None:
            torch.save(self._values.state_dict(), folder / "values.pt")

    def _save_model(self, folder: Path) -> None:
        if self.denoiser.adapter is not None:
            save_adapter(self.denoiser, folder)
        else:
            save_denoiser(self.denoiser, self._tokenizer, folder)

    def load(self, folder: Path) -> None:
        """Restore what save wrote, bit for bit."""
        if self.denoiser.adapter is not None:
            load_adapter(self.denoiser, folder / "model")
        else:
            self._load_model(folder / "model")
        state = torch.load(folder / "optimizer.pt", weights_only=True, map_location="cpu")
        self._optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]
        if self._values is not None:
            self._values.load_state_dict(torch.load(folder / "values.pt", weights_only=True, map_location="cpu"))

    def _load_model(self, folder: Path) -> None:
        family, dtype = self.denoiser.family, next(self.denoiser.module.parameters()).dtype
        saved = dict(load_denoiser(folder, family=family, dtype=dtype)[0].module.named_parameters())
        own = dict(self.denoiser.module.named_parameters())
        odd = sorted(
            n for n in saved.keys() | own.keys() if n not in saved or n not in own or saved[n].shape != own[n].shape
        )
        if odd:
            raise UserError(
                f"checkpoint '{folder}' is of another model: {', '.join(odd[:3])} differ; resume its own run"
            )
        with torch.no_grad():
            for name, value in saved.items():
                own[name].copy_(value)


@contextlib.contextmanager
def _evaluating(denoiser: TransformersDenoiser) -> Iterator[None]:
    was_training = denoiser.module.training
    denoiser.module.eval()
    try:
        yield
    finally:
        denoiser.module.train(was_training)
