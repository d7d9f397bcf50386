"""Evaluation mode for as long as something is only looked at."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Inside, the module is in evaluation mode; afterwards in the mode it was in, also after an error.

    In training mode gradient checkpointing silently drops the cache and adapters apply dropout.
    """
    training = module.training
    if training:
        module.eval()
    try:
        yield
    finally:
        if training:
            module.train()
