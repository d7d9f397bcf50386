"""Weights on their way from learners to engines: buckets of bytes, written in place, and checked by who received them.

    begin(step, layout)  write(bucket) ...  commit(step)

An engine that is between begin and a good commit holds mixed weights and refuses to decode.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dllm_rl.errors import RunStopped
from dllm_rl.models.digest import tensor_digests

_ALIGN = 16  # bytes; any dtype can be viewed at such an offset


class PushError(RunStopped):
    """A push of weights that did not arrive as it was sent."""


class DroppedBucket(PushError):
    """Weights were announced and did not come."""


class StaleVersion(PushError):
    """Older weights than those that are there."""


class UnknownWeight(PushError):
    """A name or a shape that the receiver does not have."""


class DigestMismatch(PushError):
    """The receiver holds other values than the sender."""


class PushTimeout(PushError):
    """A worker did not finish its part in time."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of a push."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes in a bucket, the gap to the next tensor included."""
        size = torch.Size(self.shape).numel() * self.dtype.itemsize
        return -(-size // _ALIGN) * _ALIGN


Layout = Sequence[Sequence[TensorSpec]]  # buckets


def buckets(entries: Iterable[TensorSpec], limit: int) -> list[list[TensorSpec]]:
    """Entries in order, in buckets of at most ``limit`` bytes (one larger tensor has a bucket of its own)."""
    found: list[list[TensorSpec]] = []
    room = 0
    for entry in entries:
        if not found or entry.nbytes > room:
            found.append([])
            room = limit
        found[-1].append(entry)
        room -= entry.nbytes
    return found


def size_of(bucket: Sequence[TensorSpec]) -> int:
    """Bytes."""
    return sum(entry.nbytes for entry in bucket)


def fill(buffer: Tensor, bucket: Sequence[TensorSpec], values: Mapping[str, Tensor]) -> None:
    """Copy tensors into a flat uint8 buffer."""
    for entry, view in _views(buffer, bucket):
        view.copy_(values[entry.name].detach())


def _views(buffer: Tensor, bucket: Sequence[TensorSpec]) -> Iterable[tuple[TensorSpec, Tensor]]:
    begin = 0
    for entry in bucket:
        size = torch.Size(entry.shape).numel() * entry.dtype.itemsize
        yield entry, buffer[begin : begin + size].view(entry.dtype).view(entry.shape)
        begin += entry.nbytes


class WeightReceiver:
    """The receiving end: parameters that are overwritten in place.

    Attributes:
        complete: whether the parameters are those of one version.
        step: of the weights that are there, -1 before the first push.
    """

    def __init__(self, parameters: Mapping[str, Tensor], name: str) -> None:
        """Look at the parameters.

        Args:
            parameters: by the names that senders use.
            name: of the receiver, for messages.
        """
        self._parameters, self._name = dict(parameters), name
        self.complete, self.step = True, -1
        self._layout: Layout = ()
        self._written: set[int] = set()

    def begin(self, step: int, layout: Layout, *, allow_older: bool = False) -> None:
        """Expect these buckets.

        Args:
            step: of the weights to come.
            layout: buckets of tensors.
            allow_older: older weights are meant: a run went back to a checkpoint.
        Raises:
            StaleVersion: the weights are older than those that are there.
            UnknownWeight: a tensor that is not there, or of another shape or dtype.
        """
        if step < self.step and not allow_older:
            raise StaleVersion(f"{self._name} holds the weights of step {self.step} and was offered those of {step}")
        for entry in (entry for bucket in layout for entry in bucket):
            own = self._parameters.get(entry.name)
            if own is None:
                raise UnknownWeight(f"{self._name} has no weight '{entry.name}'; it has {_some(self._parameters)}")
            if tuple(own.shape) != entry.shape or own.dtype != entry.dtype:
                raise UnknownWeight(
                    f"{self._name}: '{entry.name}' is {tuple(own.shape)} {own.dtype}, it was offered {entry.shape} "
                    f"{entry.dtype}"
                )
        self._layout, self._written, self.complete = layout, set(), False

    def write(self, number: int, buffer: Tensor) -> None:
        """Overwrite the parameters of a bucket with the bytes of a flat uint8 buffer."""
        with torch.no_grad():
            for entry, view in _views(buffer, self._layout[number]):
                self._parameters[entry.name].copy_(view)
        self._written.add(number)

    def commit(self, step: int) -> dict[str, int]:
        """Digests of the parameters as they are now; they may be used once the driver has compared them.

        Raises:
            DroppedBucket: a bucket did not come.
        """
        missing = [number for number in range(len(self._layout)) if number not in self._written]
        if missing:
            names = [entry.name for entry in self._layout[missing[0]]]
            raise DroppedBucket(
                f"{self._name} received {len(self._written)} of {len(self._layout)} buckets of step {step}; bucket "
                f"{missing[0]} is missing ({_some(names)})"
            )
        found = self.digests()
        self.step = step
        return found

    def digests(self) -> dict[str, int]:
        """Of the parameters that the last push named."""
        names = [entry.name for bucket in self._layout for entry in bucket]
        return tensor_digests((name, self._parameters[name]) for name in names)

    def accept(self) -> None:
        """The driver found the digests right."""
        self.complete = True


def compare(name: str, sent: Mapping[str, int], held: Mapping[str, int]) -> None:
    """Raise DigestMismatch naming the first tensor that differs."""
    odd = sorted(key for key in sent.keys() | held.keys() if sent.get(key) != held.get(key))
    if odd:
        raise DigestMismatch(
            f"{name} holds other values than were sent in {len(odd)} of {len(sent)} tensors, first '{odd[0]}'; it is "
            f"not given any prompt"
        )


def _some(names: Iterable[Any]) -> str:
    known = list(names)
    return ", ".join(map(str, known[:3])) + (f" and {len(known) - 3} more" if len(known) > 3 else "")
