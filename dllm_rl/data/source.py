"""Which items a step works on: a pure function of seed and step, so that the data cursor is the step number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, TypeVar

import torch

from dllm_rl.errors import UserError
from dllm_rl.seeding import generator_for

T = TypeVar("T")


class PromptSource(Generic[T]):
    """Epochs of independently shuffled items, cut into batches; a batch may straddle two epochs.

    Attributes:
        items: all of them, in their own order.
    """

    def __init__(self, items: Sequence[T], per_step: int, seed: int) -> None:
        """Hold the items.

        Args:
            items: at least one.
            per_step: items per batch.
            seed: run seed.
        """
        if not items:
            raise UserError("the training split is empty: there is nothing to train on")
        self.items, self._per_step, self._seed = items, per_step, seed
        self._orders: dict[int, list[int]] = {}

    def batch(self, step: int) -> list[T]:
        """The items of a step (0-based); every item comes exactly once per epoch."""
        first = step * self._per_step
        places = range(first, first + self._per_step)
        epochs = {place // len(self.items) for place in places}
        self._orders = {epoch: self._orders.get(epoch) or self._order(epoch) for epoch in epochs}
        return [self.items[self._orders[p // len(self.items)][p % len(self.items)]] for p in places]

    def _order(self, epoch: int) -> list[int]:
        order: list[int] = torch.randperm(len(self.items), generator=generator_for(self._seed, "data", epoch)).tolist()
        return order
