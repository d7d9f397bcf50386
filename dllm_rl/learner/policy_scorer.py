"""Scores choices of positions with the network of an unmasking strategy.

The rollout recorded what the network saw at each forward, so that this runs no forward of the language model.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from dllm_rl.diffusion.layout import block_index
from dllm_rl.errors import UserError
from dllm_rl.learner.scorer import Share
from dllm_rl.protocols.strategy import Candidates, UnmaskingStrategy
from dllm_rl.types import BlockOrigin, LikelihoodEstimate, MaskSample, RolloutBatch

Part = tuple[Tensor, Tensor]  # row and forward numbers of a micro-batch


class PolicyScorer:
    """The Scorer of an unmasking policy: fills in choice_logp."""

    def __init__(
        self,
        strategy: UnmaskingStrategy,
        tokens_per_microbatch: int,
        *,
        block_size: int,
        block_origin: BlockOrigin,
        sees_block_only: bool,
    ) -> None:
        """Take over a strategy's policy.

        Args:
            strategy: trained in place; engines in this process share it.
            tokens_per_microbatch: bound on padded tokens per micro-batch.
            block_size: decoding block of the rollouts, tokens.
            block_origin: where decoding blocks start.
            sees_block_only: the model is block-causal, so that a forward computes its active block alone.
        """
        assert strategy.policy is not None, "build_run() refuses strategies without a policy"
        self.trained: Sequence[tuple[str, nn.Parameter]] = list(strategy.policy.named_parameters())
        self.ticks = 0
        self._strategy, self._budget = strategy, tokens_per_microbatch
        self._block_size, self._block_origin, self._sees_block_only = block_size, block_origin, sees_block_only

    def plan(self, batch: RolloutBatch, masks: MaskSample) -> list[Part]:
        """Micro-batches of every forward."""
        return self._parts(batch, self._happened(batch))

    def add(
        self, estimate: LikelihoodEstimate, batch: RolloutBatch, masks: MaskSample, work: Sequence[Part], *, draws: bool
    ) -> LikelihoodEstimate:
        """An estimate with the log-probability (N, T) of each forward's choice."""
        parts = [(part, self._log_prob(batch, *part)) for part in work]
        logp = torch.zeros(self._happened(batch).shape)
        for part, value in parts:  # after all have been issued: each copy to the host waits for the device
            logp = logp.index_put(part, value.cpu())
        return dataclasses.replace(estimate, choice_logp=logp)

    def shares(self, batch: RolloutBatch, masks: MaskSample, slope: LikelihoodEstimate) -> list[Share]:
        """What to take the gradient of; choices that the loss does not depend on are left out."""
        factor = slope.choice_logp
        assert factor is not None, "add() comes first"
        parts = self._parts(batch, self._happened(batch) & (factor != 0))
        return [functools.partial(self._share, batch, factor, part) for part in parts]

    def save(self, folder: Path) -> None:
        """Write the policy into a folder."""
        self._strategy.save(folder)

    def load(self, folder: Path) -> None:
        """Restore what save wrote, bit for bit."""
        self._strategy.load(folder)

    def _share(self, batch: RolloutBatch, factor: Tensor, part: Part) -> Tensor:
        logp = self._log_prob(batch, *part)
        return (logp * factor[part].to(logp.device)).sum()

    def _happened(self, batch: RolloutBatch) -> Tensor:
        return torch.arange(int(batch.num_forwards.max())) < batch.num_forwards[:, None]

    def _parts(self, batch: RolloutBatch, wanted: Tensor) -> list[Part]:
        """The wanted (N, T) forwards within the token budget."""
        size = max(1, self._budget // batch.tokens.shape[1])
        return [(part[:, 0], part[:, 1]) for part in wanted.nonzero().split(size) if len(part)]

    def _log_prob(self, batch: RolloutBatch, row: Tensor, forward: Tensor) -> Tensor:
        """(R,) log-probabilities of choices, from what the policy saw then."""
        self.ticks += 1
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
        device = self.trained[0][1].device
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
