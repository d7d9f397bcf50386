"""A diffusion value model: predicts the reward of a row from the state in which a token is about to be committed."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from dllm_rl.config.cluster import LearnerSection
from dllm_rl.diffusion import likelihood, values
from dllm_rl.learner.optimizer import Optimizer
from dllm_rl.models.denoiser import TransformersDenoiser
from dllm_rl.models.evaluating import evaluating
from dllm_rl.types import MaskSample, RolloutBatch


class ValueModel:
    """A copy of the policy's network with a linear head, zero at first, and an optimiser of its own."""

    def __init__(
        self, denoiser: TransformersDenoiser, config: LearnerSection, total_steps: int, *, seed: int = 0
    ) -> None:
        """Copy the policy.

        Args:
            denoiser: the policy at the start of the run; what is trainable there is trainable here.
            config: optimiser settings; the learning rate is value_lr.
            total_steps: length of the run, for the schedule.
            seed: of stochastic rounding.
        """
        self._denoiser, self._budget = copy.deepcopy(denoiser), config.tokens_per_microbatch
        weight = next(self._denoiser.module.parameters())
        self._head = nn.Linear(self._denoiser.module.config.hidden_size, 1, bias=False, device=weight.device)
        nn.init.zeros_(self._head.weight)
        settings = config.model_copy(update={"lr": config.value_lr})
        trained = [p for p in self._denoiser.module.parameters() if p.requires_grad]
        self._optimizer = Optimizer([*trained, *self._head.parameters()], settings, total_steps, seed=seed)

    def predict(self, batch: RolloutBatch, masks: MaskSample) -> Tensor:
        """(N, L) float32 without gradient; 0 where no draw scores the token."""
        out = torch.zeros(batch.tokens.shape, device=self._head.weight.device)  # copied once, not per micro-batch
        with torch.no_grad(), evaluating(self._denoiser.module):
            for work in likelihood.plan(batch, masks, self._budget):
                value, row, position = self._values(batch, masks, work)
                out[row, position] = value
        return out.cpu()

    def update(self, batch: RolloutBatch, masks: MaskSample, old: Tensor, target: Tensor, *, clip: float) -> float:
        """One step towards the returns (N, L); gives the mean loss per token."""
        self._denoiser.module.train()
        self._optimizer.zero_grad()
        total = torch.zeros((), dtype=torch.float64)  # read once: reading each part would wait for the device each time
        count = int((masks.weight != 0).sum())
        for work in likelihood.plan(batch, masks, self._budget):
            value, row, position = self._values(batch, masks, work)
            known, wanted = (t.to(value.device)[row, position] for t in (old, target))
            loss = values.value_error(value, known, wanted, clip).sum() / count
            loss.backward()
            total = total + loss.detach()
        self._optimizer.step(lambda norm: None)
        return float(total)

    def forget_gradients(self) -> None:
        """Free them."""
        self._optimizer.zero_grad()

    def start(self, step: int) -> None:
        """Set the learning rate of a step."""
        self._optimizer.start(step)

    def state_dict(self) -> dict[str, Any]:
        """Trained weights and optimiser state."""
        return {"weights": dict(self._trained()), "optimizer": self._optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore state_dict()."""
        with torch.no_grad():
            for name, value in self._trained().items():
                value.copy_(state["weights"][name])
        self._optimizer.load_state_dict(state["optimizer"])

    def _trained(self) -> dict[str, Tensor]:
        named = {n: p for n, p in self._denoiser.module.named_parameters() if p.requires_grad}
        return named | {"value_head": self._head.weight}

    def _values(self, batch: RolloutBatch, masks: MaskSample, work: likelihood.Work) -> tuple[Tensor, Tensor, Tensor]:
        """(values (M,), row, position) of what a micro-batch scores."""
        states, pair, position = likelihood.scored_states(self._denoiser, batch, masks, work)
        return self._head(states.float()).squeeze(-1), work.row.to(states.device)[pair], position
