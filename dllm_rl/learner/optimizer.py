"""AdamW with our schedule and clipping: what every learner steps with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dllm_rl.config.cluster import LearnerSection
from dllm_rl.learner.schedule import learning_rate


class Optimizer:
    """AdamW; weight decay on matrices only; the learning rate is a function of the step."""

    def __init__(self, parameters: Sequence[nn.Parameter], config: LearnerSection, total_steps: int) -> None:
        """Start at step 0.

        Args:
            parameters: what is trained.
            config: optimiser settings.
            total_steps: length of the run, for the schedule.
        """
        self._parameters, self._config, self._total_steps = list(parameters), config, total_steps
        decayed = [p for p in parameters if p.dim() >= 2]
        others = [p for p in parameters if p.dim() < 2]
        groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
        self._adam = torch.optim.AdamW([g for g in groups if g["params"]], config.lr, config.betas, config.eps)

    def start(self, step: int) -> float:
        """Set and return the learning rate of a step."""
        lr = learning_rate(step, self._total_steps, self._config)
        for group in self._adam.param_groups:
            group["lr"] = lr
        return lr

    def zero_grad(self) -> None:
        """Forget gradients."""
        self._adam.zero_grad(set_to_none=True)

    def backward(self, value: Tensor, *, last: bool) -> None:
        """Add the gradient of a scalar.

        Args:
            value: scalar with graph.
            last: no other follows before step(); ranks then exchange gradients.
        """
        value.backward()

    def step(self, check: Callable[[Tensor], None]) -> Tensor:
        """Clip to max_grad_norm and change the parameters; returns the global gradient norm before clipping.

        Args:
            check: told the norm before anything changes; may raise.
        """
        norm = nn.utils.clip_grad_norm_(self._parameters, self._config.max_grad_norm or float("inf"))
        check(norm)
        self._adam.step()
        return norm

    def state_dict(self) -> Mapping[str, Any]:
        """State of AdamW."""
        return self._adam.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore state_dict()."""
        self._adam.load_state_dict(state)
