"""Trajectories on their way between processes: a few long arrays instead of thousands of small tensors."""

from __future__ import annotations

import typing
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dllm_rl.types import Trajectory

_HINTS = typing.get_type_hints(Trajectory)
_TENSORS = tuple(name for name, hint in _HINTS.items() if Tensor in (hint, *typing.get_args(hint)))
_OTHERS = tuple(name for name in _HINTS if name not in _TENSORS)


@dataclass(frozen=True, slots=True)
class PackedTrajectories:
    """Packed trajectories.

    Attributes:
        flat: field -> the values of all trajectories one after the other, as a numpy array.
        shapes: field -> shape in each trajectory, None where there is no such tensor.
        others: the remaining fields, one tuple per trajectory.
    """

    flat: dict[str, Any]
    shapes: dict[str, list[tuple[int, ...] | None]]
    others: list[tuple[Any, ...]]


def pack(trajectories: Sequence[Trajectory]) -> PackedTrajectories:
    """The opposite of unpack."""
    flat: dict[str, Any] = {}
    shapes: dict[str, list[tuple[int, ...] | None]] = {}
    for name in _TENSORS:
        values: list[Tensor | None] = [getattr(t, name) for t in trajectories]
        shapes[name] = [None if value is None else tuple(value.shape) for value in values]
        there = [value.reshape(-1) for value in values if value is not None]
        flat[name] = torch.cat(there).numpy() if there else None
    return PackedTrajectories(flat, shapes, [tuple(getattr(t, name) for name in _OTHERS) for t in trajectories])


def unpack(packed: PackedTrajectories) -> list[Trajectory]:
    """The trajectories; their tensors share memory of their own."""
    columns: dict[str, list[Any]] = {}
    for name in _TENSORS:
        shapes = packed.shapes[name]
        if packed.flat[name] is None:
            columns[name] = [None] * len(shapes)
            continue
        whole = torch.tensor(packed.flat[name])  # a copy: what came through shared memory must not be written to
        sizes = [0 if shape is None else torch.Size(shape).numel() for shape in shapes]
        pieces = whole.split(sizes)
        columns[name] = [
            None if shape is None else piece.view(shape) for shape, piece in zip(shapes, pieces, strict=True)
        ]
    found = []
    for row, others in enumerate(packed.others):
        values: dict[str, Any] = dict(zip(_OTHERS, others, strict=True))
        found.append(Trajectory(**values, **{name: columns[name][row] for name in _TENSORS}))
    return found
