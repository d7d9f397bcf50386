"""Evaluation mode for as long as something is only looked at."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


def has_dropout(module: nn.Module) -> bool:
    """Whether the module computes something else in training mode: a dropout layer, or dropout of attention."""
    # Private, but the one base class of all dropout layers: a list of them would miss the next.
    layers = any(isinstance(layer, nn.modules.dropout._DropoutNd) and layer.p > 0 for layer in module.modules())
    return layers or getattr(getattr(module, "config", None), "attention_dropout", 0.0) > 0


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
