"""AdamW with our schedule and clipping: what every learner steps with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dllm_rl.config.cluster import LearnerSection
from dllm_rl.errors import UserError
from dllm_rl.learner.master_weights import MasterWeights
from dllm_rl.learner.schedule import learning_rate
from dllm_rl.seeding import derive


class Optimizer:
    """AdamW over float32 weights; weight decay on matrices only; the learning rate is a function of the step."""

    def __init__(
        self, parameters: Sequence[nn.Parameter], config: LearnerSection, total_steps: int, *, seed: int = 0
    ) -> None:
        """Start at step 0.

        Args:
            parameters: what is trained.
            config: optimiser settings.
            total_steps: length of the run, for the schedule.
            seed: of stochastic rounding.
        """
        self._config, self._total_steps, self._seed, self._updates = config, total_steps, seed, 0
        self._masters = MasterWeights(parameters, keep=config.master_weights == "float32")
        self._device = parameters[0].device
        self._adam = adamw(self._masters.weights, [p.dim() >= 2 for p in parameters], config)

    def start(self, step: int) -> float:
        """Set and return the learning rate of a step."""
        lr = learning_rate(step, self._total_steps, self._config)
        for group in self._adam.param_groups:
            group["lr"] = lr
        return lr

    def zero_grad(self) -> None:
        """Forget gradients."""
        self._masters.zero_grad()

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
        gradients = self._masters.gradients()
        norm = nn.utils.get_total_norm(gradients)
        check(norm)
        if gradients and self._config.max_grad_norm is not None:
            # Private; torch's clip_grads_with_norm_ does the same, but to the gradients of parameters alone.
            torch._foreach_mul_(gradients, (self._config.max_grad_norm / (norm + 1e-6)).clamp(max=1.0))
        generator = torch.Generator(self._device).manual_seed(derive(self._seed, "rounding", self._updates))
        self._masters.step(self._adam.step, generator)
        self._updates += 1
        return norm

    def state_dict(self) -> Mapping[str, Any]:
        """State of AdamW, the master weights, and the number of updates so far."""
        return {"adam": self._adam.state_dict(), "masters": self._masters.state_dict(), "updates": self._updates}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore state_dict().

        Raises:
            UserError: another version wrote it, without master weights.
        """
        if "adam" not in state:
            raise UserError(
                "the checkpoint's optimizer.pt is of a version of dllm-rl without master weights; resume with that "
                "version, or start a new run from its model folder (model.path)"
            )
        self._adam.load_state_dict(state["adam"])
        self._masters.load_state_dict(state["masters"])
        self._updates = state["updates"]


def adamw(weights: Sequence[nn.Parameter], decayed: Sequence[bool], config: LearnerSection) -> torch.optim.AdamW:
    """Torch's AdamW with the settings of a configuration.

    Args:
        weights: what it steps.
        decayed: which of them weight decay applies to.
        config: optimiser settings.
    """
    pairs = list(zip(weights, decayed, strict=True))
    groups = [
        {"params": [weight for weight, is_decayed in pairs if is_decayed == wanted], "weight_decay": decay}
        for wanted, decay in ((True, config.weight_decay), (False, 0.0))
    ]
    # One kernel for all weights; torch takes it by itself on no device.
    fused = all(w.is_cuda for w in weights) and not config.offload_optimizer
    settings = (config.lr, config.betas, config.eps)
    return torch.optim.AdamW([g for g in groups if g["params"]], *settings, fused=fused or None)
