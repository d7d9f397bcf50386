"""Accelerators that runs are planned for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import psutil
import torch

from dllm_rl.errors import UserError, nearest

RESERVE = 0.05  # of a card: what its allocator cannot use because of gaps


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """A device.

    Attributes:
        name: in messages.
        memory: bytes that a driver shows.
        flops: dense bfloat16 operations per second with sums in float32, of the data sheet; None = unknown.
        kind: "cuda" or "cpu".
    """

    name: str
    memory: int
    flops: float | None
    kind: str = "cuda"

    @property
    def usable(self) -> int:
        """Bytes that a run may plan with."""
        return int(self.memory * (1 - RESERVE))


# MiB as nvidia-smi shows them, TFLOP/s of NVIDIA's data sheets.
CARDS: Mapping[str, Card] = {
    name: Card(name=name, memory=mib << 20, flops=tflops * 1e12)
    for name, mib, tflops in (
        ("b200-180gb", 183359, 2250.0),
        ("h200-141gb", 143771, 989.0),
        ("h100-80gb", 81559, 989.0),
        ("a100-80gb", 81920, 312.0),
        ("a100-40gb", 40960, 312.0),
        ("l40s-48gb", 46068, 362.0),
        ("a6000-48gb", 49140, 155.0),
        ("rtx5090-32gb", 32607, 210.0),
        ("rtx4090-24gb", 24564, 165.0),
        ("rtx3090-24gb", 24576, 71.0),
    )
}


def card_of(name: str | None, memory_gb: float | None, tflops: float | None) -> Card:
    """The card of a plan: by name, by its figures, or else what is in this machine.

    Args:
        name: of CARDS, or None.
        memory_gb: overrides its memory, 10^9 bytes.
        tflops: overrides its speed.
    Raises:
        UserError: an unknown name, or figures that are none.
    """
    for option, value in (("--memory-gb", memory_gb), ("--tflops", tflops)):
        if value is not None and not 0 < value < float("inf"):
            raise UserError(f"{option} {value:g}: must be above 0")
    if name is not None and name not in CARDS:
        raise UserError(f"--card {name}: unknown{nearest(name, CARDS)}; or give --memory-gb and --tflops")
    found = CARDS[name] if name is not None else _here(given=memory_gb is not None)
    return Card(
        name=found.name,
        memory=found.memory if memory_gb is None else int(memory_gb * 1e9),
        flops=found.flops if tflops is None else tflops * 1e12,
        kind=found.kind,
    )


def _here(*, given: bool) -> Card:
    if given:
        return Card(name="a GPU", memory=0, flops=None)
    if torch.cuda.is_available():
        about = torch.cuda.get_device_properties(0)
        return Card(name=about.name, memory=about.total_memory, flops=None)
    return Card(name="this machine's CPU", memory=psutil.virtual_memory().total, flops=None, kind="cpu")
