"""Randomness by counter: every draw is a pure function of the run seed and of what it is for.

Nothing in dllm-rl stores generator state, so resuming, restarting an engine, another batch composition or another
number of engines gives the same samples.
"""

from __future__ import annotations

import hashlib
import random

import torch
from torch import Tensor

_MASK63 = (1 << 63) - 1
# SplitMix64 finaliser constants (Steele, Lea, Flood 2014), as signed 64-bit integers.
_GOLDEN = -7046029254386353131
_MIX_1 = -4658895280553007687
_MIX_2 = -7723592293110705685


def derive(seed: int, *parts: int | str) -> int:
    """A 63-bit integer that depends on every argument: the key of a stream of random numbers.

    Args:
        seed: the run seed.
        parts: what the stream is for, e.g. ``("masks", step)``; 1 and "1" are different parts.
    """
    text = repr((seed, *parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") & _MASK63


def generator_for(seed: int, *parts: int | str) -> torch.Generator:
    """A fresh CPU generator for (seed, parts); see derive."""
    return torch.Generator().manual_seed(derive(seed, *parts))


def python_random(seed: int, *parts: int | str) -> random.Random:
    """A fresh ``random.Random`` for (seed, parts): for data generators that need shuffling and choices."""
    return random.Random(derive(seed, *parts))


def _shift_right(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)  # int64 >> is arithmetic; SplitMix64 wants a logical shift


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def uniform(*counters: Tensor | int) -> Tensor:
    """Uniform numbers in (0, 1), one per element of the broadcast counters; a pure function of them.

    Args:
        counters: int64 tensors or integers that broadcast together, e.g. (row key (N, 1), forward, position (1, L)).
    Returns:
        float64 tensor of the broadcast shape, strictly between 0 and 1.
    Source: SplitMix64 finaliser, applied once per counter.
    """
    state: Tensor | None = None
    for counter in counters:
        value = counter if isinstance(counter, Tensor) else torch.tensor(counter, dtype=torch.int64)
        state = _mix(value * _GOLDEN + 1) if state is None else _mix((state ^ value.to(state.device)) * _GOLDEN + 1)
    assert state is not None, "uniform() needs a counter"
    return (_shift_right(state, 12).double() + 0.5) / (1 << 52)  # exact, so never 0 or 1


def seed_everything(seed: int) -> None:
    """Seed the global generators, for randomness that is not ours to pass a generator to (dropout)."""
    torch.manual_seed(seed)
