"""Splits a batch of rollouts into the rows of several optimiser updates."""

from __future__ import annotations

import torch
from torch import Tensor

from dllm_rl.types import RolloutBatch


def split(batch: RolloutBatch, number: int) -> list[Tensor]:
    """Rows (int64, ascending) of each minibatch; the same on every machine, and of equal size as far as groups allow.

    Groups stay whole: pairs must, and advantages of a group's rows belong together. Groups are taken in their order, so
    that minibatches are as random as the prompts of a step.

    Args:
        batch: rows of the step.
        number: of minibatches; fewer if there are fewer groups.
    """
    if number == 1:
        return [torch.arange(len(batch))]
    groups = [(batch.group == one).nonzero().flatten() for one in batch.group.unique().tolist()]
    number = min(number, len(groups))
    ends = [round((place + 1) * len(groups) / number) for place in range(number)]
    return [torch.cat(groups[begin:end]).sort().values for begin, end in zip([0, *ends], ends, strict=False)]
