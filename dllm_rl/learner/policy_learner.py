"""Trains the network of an unmasking strategy; the language model is its environment and stays as it is.

The rollout recorded what the network saw at each forward, so that an update runs no forward of the language model.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from dllm_rl import seeding
from dllm_rl.config.cluster import LearnerSection
from dllm_rl.diffusion import surrogate
from dllm_rl.diffusion.layout import block_index
from dllm_rl.errors import UserError
from dllm_rl.learner.optimizer import Optimizer
from dllm_rl.learner.torch_learner import NonFiniteError
from dllm_rl.models.digest import digest
from dllm_rl.protocols.algorithm import Algorithm
from dllm_rl.protocols.strategy import Candidates, UnmaskingStrategy
from dllm_rl.types import (
    BlockOrigin,
    Experience,
    GlobalCounts,
    LikelihoodEstimate,
    MaskSample,
    Rewards,
    RolloutBatch,
    WeightsVersion,
)


class PolicyLearner:
    """Owns the weights of an unmasking policy.

    Attributes:
        step: finished optimiser steps (batches).
    """

    def __init__(
        self,
        strategy: UnmaskingStrategy,
        config: LearnerSection,
        *,
        total_steps: int,
        seed: int,
        block_size: int,
        block_origin: BlockOrigin,
        sees_block_only: bool,
    ) -> None:
        """Take over a strategy's policy.

        Args:
            strategy: trained in place; engines in this process share it.
            config: optimiser settings.
            total_steps: length of the run, for the schedule.
            seed: run seed.
            block_size: decoding block of the rollouts, tokens.
            block_origin: where decoding blocks start.
            sees_block_only: the model is block-causal, so that a forward computes its active block alone.
        """
        assert strategy.policy is not None, "build_run() refuses strategies without a policy"
        self.step = 0
        self._strategy, self._config, self._seed = strategy, config, seed
        self._block_size, self._block_origin, self._sees_block_only = block_size, block_origin, sees_block_only
        self._trained = list(strategy.policy.named_parameters())
        self._optimizer = Optimizer([p for _, p in self._trained], config, total_steps)

    def score(self, batch: RolloutBatch, masks: MaskSample, *, reference: bool = False) -> LikelihoodEstimate:
        """Log-probability (N, T) of each forward's choice, without gradient. There is no reference policy."""
        assert not reference, "an unmasking policy is trained from scratch: it has no reference"
        logp = torch.zeros(len(batch), int(batch.num_forwards.max()))
        with torch.no_grad():
            for row, forward in self._microbatches(batch):
                logp[row, forward] = self._log_prob(batch, row, forward).cpu()
        return LikelihoodEstimate(token_logp=logp, draw_logp=logp.new_zeros(0, len(batch)))

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
        """updates_per_step optimiser updates on one batch, with one micro-batch's graph alive at a time.

        Raises:
            NonFiniteError: non-finite loss or gradient; weights are those before the update.
        """
        seeding.seed_everything(seeding.derive(self._seed, "update", self.step))
        lr = self._optimizer.start(self.step)
        old: LikelihoodEstimate | None = None
        metrics: dict[str, float] = {}
        for _ in range(self._config.updates_per_step):
            self._optimizer.zero_grad()
            work = list(self._microbatches(batch))
            alive = len(work) == 1  # its graph fits: keep it rather than compute it twice
            new = self._current(batch, work[0]) if alive else self.score(batch, masks)
            old = old or LikelihoodEstimate(token_logp=new.token_logp.detach().clone(), draw_logp=new.draw_logp)
            if not alive:
                new.token_logp.requires_grad_()
            experience = Experience(
                batch=batch,
                rewards=rewards,
                advantage=advantage,
                masks=masks,
                old=old,
                reference=None,
                num_tokens=int(batch.num_forwards.sum()),
                num_rows=len(batch),
            )
            loss = algorithm.loss(new, experience)
            self._require_finite("loss", loss.value)
            if alive:
                loss.value.backward()
            else:
                (coefficient,) = torch.autograd.grad(loss.value, new.token_logp)
                for row, forward in self._microbatches(batch, coefficient != 0):
                    logp = self._log_prob(batch, row, forward)
                    (logp * coefficient[row, forward].to(logp.device)).sum().backward()
            norm = self._optimizer.step(functools.partial(self._require_finite, "gradient norm"))
            metrics = {"loss": loss.value.item(), "grad_norm": norm.item(), "lr": lr}
            metrics |= surrogate.derived_metrics({name: value.item() for name, value in loss.metrics.items()})
        self.step += 1
        return metrics

    def reference_digest(self) -> str:
        """There is no reference."""
        return ""

    def drop_reference(self) -> None:
        """There is no reference."""

    def skip(self) -> Mapping[str, float]:
        """A step from which the algorithm kept no row."""
        self.step += 1
        return {}

    def version(self) -> WeightsVersion:
        """The step and a digest of the policy."""
        return WeightsVersion(step=self.step, digest=digest(self._trained))

    def named_weights(self) -> Iterable[tuple[str, nn.Parameter]]:
        """Trained weights by module name."""
        return iter(self._trained)

    def save(self, folder: Path) -> None:
        """The policy below folder/model, optimiser state and step in folder/optimizer.pt."""
        self._strategy.save(folder / "model")
        torch.save({"step": self.step, "optimizer": self._optimizer.state_dict()}, folder / "optimizer.pt")

    def load(self, folder: Path) -> None:
        """Restore what save wrote, bit for bit."""
        self._strategy.load(folder / "model")
        state = torch.load(folder / "optimizer.pt", weights_only=True, map_location="cpu")
        self._optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]

    def _current(self, batch: RolloutBatch, work: tuple[Tensor, Tensor]) -> LikelihoodEstimate:
        """All log-probabilities with their graph."""
        logp = torch.zeros(len(batch), int(batch.num_forwards.max()))
        logp = logp.index_put(work, self._log_prob(batch, *work).cpu())
        return LikelihoodEstimate(token_logp=logp, draw_logp=torch.zeros(0, len(batch)))

    def _microbatches(self, batch: RolloutBatch, wanted: Tensor | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """(row, forward) numbers of every forward, or of the wanted (N, T) ones, within the token budget."""
        happened = torch.arange(int(batch.num_forwards.max())) < batch.num_forwards[:, None]
        pairs = (happened if wanted is None else happened & wanted).nonzero()
        size = max(1, self._config.tokens_per_microbatch // batch.tokens.shape[1])
        for start in range(0, len(pairs), size):
            part = pairs[start : start + size]
            yield part[:, 0], part[:, 1]

    def _log_prob(self, batch: RolloutBatch, row: Tensor, forward: Tensor) -> Tensor:
        """(R,) log-probabilities of choices, from what the policy saw then."""
        if batch.confidence is None or batch.order is None:
            raise UserError("this engine does not keep confidences and orders; train unmasking policies with another")
        step, now = batch.unmask_step[row], forward[:, None]
        canvas = (batch.completion | batch.tail)[row]
        masked = canvas & (step >= now)
        block_ids = block_index(batch.prompt_length[row], step.shape[1], self._block_size, self._block_origin)
        last = int(block_ids.max()) + 1
        active = block_ids == torch.where(masked, block_ids, last).amin(-1, keepdim=True)
        context = canvas & active if self._sees_block_only else canvas
        masked = masked & context
        blank = torch.zeros(step.shape)
        device = self._trained[0][1].device
        candidates = Candidates(
            eligible=(masked & active).to(device),
            token=torch.zeros_like(step).to(device),
            logp=batch.confidence[row, forward].log().to(device),
            entropy=blank.to(device),
            margin=blank.to(device),
            noise=blank.double().to(device),
            count=masked.sum(-1).to(device),
            context=context.to(device),
            masked=masked.to(device),
            time=(forward.float() / canvas.sum(-1)).to(device),
        )
        order = torch.where(step == now, batch.order[row], 0)
        return self._strategy.log_prob(candidates, order.to(device))

    def _require_finite(self, what: str, value: Tensor) -> None:
        if not bool(torch.isfinite(value)):
            raise NonFiniteError(
                f"{what} is {value.item()} at step {self.step}; stopped before the update. Lower learner.lr or "
                f"learner.max_grad_norm, or resume from the last checkpoint"
            )
