"""Weights that make room: out of a device's memory and back into it, in place."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class Offloader:
    """Tensors that can be away. They stay the same objects: whoever refers to them need not know.

    Attributes:
        asleep: whether the tensors hold nothing at the moment; using them then is an error that torch does not catch.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        """Look at the tensors.

        Args:
            tensors: that own their memory, or share it with others of them.
        """
        self.asleep = False
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors if t.numel()}
        self._storages = list(storages.values())
        self._kept: list[Tensor] = []

    def sleep(self) -> None:
        """Copy to host memory and give the device's memory back."""
        if self.asleep:
            return
        if not self._kept:  # once: pinning memory takes longer than copying
            self._kept = [
                torch.empty(s.nbytes(), dtype=torch.uint8, pin_memory=s.device.type == "cuda") for s in self._storages
            ]
        for storage, kept in zip(self._storages, self._kept, strict=True):
            kept.copy_(_bytes(storage))
            storage.resize_(0)
        if any(s.device.type == "cuda" for s in self._storages):
            torch.cuda.empty_cache()  # else other processes could not have it
        self.asleep = True

    def wake(self) -> None:
        """Bring everything back."""
        if not self.asleep:
            return
        for storage, kept in zip(self._storages, self._kept, strict=True):
            storage.resize_(kept.numel())
            _bytes(storage).copy_(kept)
        self.asleep = False


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
