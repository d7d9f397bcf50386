"""A learner that holds weights for evaluation: no optimiser, no master weights, no reference, no value model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from typing_extensions import override

from dllm_rl.learner.torch_learner import TorchLearner


class HeldLearner(TorchLearner):
    """Loads and sends weights."""

    @override
    def _make_optimizer(self, total_steps: int) -> Any:
        return None

    @override
    def load(self, folder: Path) -> None:
        """Restore the weights and the step of a checkpoint."""
        for name, scorer in self._scorers.items():
            scorer.load(folder / name)
        # Mapped: the moments beside the step are twice the size of the model, and nothing reads them.
        self.step = torch.load(folder / "optimizer.pt", weights_only=True, map_location="cpu", mmap=True)["step"]
