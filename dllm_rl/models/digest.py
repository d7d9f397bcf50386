"""Digests of weights, computed where the weights are: fast enough to check every push to an engine.

A tensor's digest is a multilinear hash of its 64-bit words modulo 2^64, sum_i word_i * c_i with odd pseudo-random c_i
(Carter and Wegman 1979 for the family; splitmix64 for the numbers): any single changed word changes it, and so do
words that have changed places. It guards against mistakes and broken transport, not against an adversary.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

_WIDTH = 1 << 15  # words per block: 256 KB, which stays in a core's cache
_MODULUS = 1 << 64


def tensor_digest(value: Tensor) -> int:
    """A 64-bit digest of a tensor's bytes; equal on every device.

    Args:
        value: any shape and dtype.
    """
    flat = value.detach().contiguous().view(-1).view(torch.uint8)
    whole = flat.numel() // 8 * 8
    body = flat[:whole] if flat.data_ptr() % 8 == 0 else flat[:whole].clone()
    words = body.view(torch.int64)
    blocks = words.numel() // _WIDTH
    table = _coefficients(_WIDTH, value.device)
    found = 0
    at_once = 1 if value.device.type == "cpu" else 1 << 10
    for begin in range(0, blocks, at_once):
        end = min(begin + at_once, blocks)
        part = words[begin * _WIDTH : end * _WIDTH].view(end - begin, _WIDTH)
        for number, total in enumerate((part * table).sum(1).tolist(), start=begin):
            found += total * _splitmix(number)
    rest = words[blocks * _WIDTH :]
    found += int((rest * table[: len(rest)]).sum()) * _splitmix(blocks)
    tail = int.from_bytes(bytes(flat[whole:].tolist()), "little")
    return (found + tail * _splitmix(-1) + flat.numel()) % _MODULUS


def tensor_digests(weights: Iterable[tuple[str, Tensor]]) -> dict[str, int]:
    """Name -> digest of the value, its shape and its dtype."""
    return {
        name: (tensor_digest(value) ^ _text(f"{tuple(value.shape)} {value.dtype}")) % _MODULUS
        for name, value in weights
    }


def joined(digests: Mapping[str, int]) -> str:
    """One digest of many named ones, whatever their order."""
    made = hashlib.blake2b(digest_size=16)
    for name in sorted(digests):
        made.update(f"{name} {digests[name]:016x}\n".encode())
    return made.hexdigest()


def digest(weights: Iterable[tuple[str, Tensor]]) -> str:
    """One digest of named weights."""
    return joined(tensor_digests(weights))


@functools.lru_cache(maxsize=8)
def _coefficients(count: int, device: torch.device) -> Tensor:
    return torch.tensor([_signed(_splitmix(i)) for i in range(count)], dtype=torch.int64, device=device)


def _splitmix(number: int) -> int:
    """The number-th output of splitmix64, made odd."""
    z = ((number + 1) * 0x9E3779B97F4A7C15) % _MODULUS
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % _MODULUS
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % _MODULUS
    return (z ^ (z >> 31)) | 1


def _signed(number: int) -> int:
    return number - _MODULUS if number >= _MODULUS // 2 else number


def _text(value: str) -> int:
    return int.from_bytes(hashlib.blake2b(value.encode(), digest_size=8).digest(), "little")
