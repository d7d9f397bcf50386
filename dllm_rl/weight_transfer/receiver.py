"""The receiving end of a push: buckets of bytes that become an engine's weights, checked by what the engine then holds.

    begin_push(step, layout)  write(bucket) ...  commit_push(step)  accept()

An engine that is between begin_push and accept holds mixed weights and refuses to decode.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dllm_rl.errors import DigestMismatch, DroppedBucket, StaleVersion
from dllm_rl.protocols.engine import RolloutEngine, TensorSpec

Layout = Sequence[Sequence[TensorSpec]]  # buckets


def buckets(specs: Iterable[TensorSpec], limit: int) -> list[list[TensorSpec]]:
    """Tensors in order, in buckets of at most ``limit`` bytes (one larger tensor has a bucket of its own)."""
    found: list[list[TensorSpec]] = []
    room = 0
    for spec in specs:
        if not found or spec.nbytes > room:
            found.append([])
            room = limit
        found[-1].append(spec)
        room -= spec.nbytes
    return found


def size_of(bucket: Sequence[TensorSpec]) -> int:
    """Bytes."""
    return sum(spec.nbytes for spec in bucket)


def views_of(buffer: Tensor, bucket: Sequence[TensorSpec]) -> dict[str, Tensor]:
    """The tensors of a bucket as views of its flat uint8 buffer."""
    found, begin = {}, 0
    for spec in bucket:
        size = torch.Size(spec.shape).numel() * spec.dtype.itemsize
        found[spec.name] = buffer[begin : begin + size].view(spec.dtype).view(spec.shape)
        begin += spec.nbytes
    return found


class WeightReceiver:
    """What an engine's worker knows of the push that is under way.

    Attributes:
        engine: whose weights are written.
        complete: whether the engine's weights are those of one version.
        step: of the weights that are there, -1 before the first push.
        layout: buckets of the last push.
    """

    def __init__(self, engine: RolloutEngine, name: str) -> None:
        """Expect nothing yet.

        Args:
            engine: whose weights are written.
            name: of the receiver, for messages.
        """
        self.engine, self._name = engine, name
        self.complete, self.step = True, -1
        self.layout: Layout = ()
        self._written: set[int] = set()

    def begin_push(self, step: int, layout: Layout, *, allow_older: bool = False) -> None:
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
        self.engine.begin_weights([spec for bucket in layout for spec in bucket])
        self.layout, self._written, self.complete = layout, set(), False

    def write(self, number: int, buffer: Tensor) -> None:
        """Hand the tensors of a bucket to the engine.

        Args:
            number: of the bucket.
            buffer: its bytes, flat uint8.
        """
        with torch.no_grad():
            self.engine.write_weights(views_of(buffer, self.layout[number]))
        self._written.add(number)

    def commit_push(self, step: int) -> Mapping[str, int]:
        """Digests of the engine's weights as they are now; they may be used once the driver has compared them.

        Raises:
            DroppedBucket: a bucket did not come.
        """
        missing = [number for number in range(len(self.layout)) if number not in self._written]
        if missing:
            names = [spec.name for spec in self.layout[missing[0]]]
            raise DroppedBucket(
                f"{self._name} received {len(self._written)} of {len(self.layout)} buckets of step {step}; bucket "
                f"{missing[0]} is missing ({some_of(names)})"
            )
        found = self.engine.commit_weights()
        self.step = step
        return found

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


def some_of(names: Iterable[Any]) -> str:
    """The first three names, and how many more there are."""
    known = list(names)
    return ", ".join(map(str, known[:3])) + (f" and {len(known) - 3} more" if len(known) > 3 else "")
