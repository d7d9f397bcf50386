"""Hints: which tokens of a reference trace are injected where, and which of them are worth training on."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor


def cut(
    trace: Sequence[int],
    *,
    share: float,
    chunk: tuple[int, int],
    room: int,
    max_gap: int,
    reveal_last: bool = False,
    generator: torch.Generator,
) -> dict[int, int]:
    """Cut a trace into chunks, reveal some, spread them over the canvas.

        f = clip(room / length, 1, 1.5);  the first revealed chunk goes to floor(start f), every later one to the end of
        the one before plus min(floor(gap f), max_gap), where gap is what lay between the two in the trace

    Args:
        trace: tokens, at least one; what exceeds the room is cut off.
        share: of the chunks that is revealed, in (0, 1]; at least one.
        chunk: fewest and most tokens per chunk.
        room: canvas tokens that hints may use.
        max_gap: tokens between two revealed chunks at most.
        reveal_last: reveal the last chunk for certain.
        generator: CPU generator.
    Returns:
        canvas offset -> token; a chunk that would leave the room is dropped.
    Source: IGPO, arXiv:2509.10396; the short chunk at the end is kept, where the released code drops it.
    """
    tokens = list(trace)[:room]
    bounds = [0]
    while bounds[-1] < len(tokens):
        size = int(torch.randint(chunk[0], chunk[1] + 1, (), generator=generator))
        bounds.append(min(bounds[-1] + size, len(tokens)))
    chunks = list(itertools.pairwise(bounds))
    order: list[int] = torch.randperm(len(chunks), generator=generator).tolist()
    if reveal_last:
        order.remove(len(chunks) - 1)
        order.insert(0, len(chunks) - 1)
    revealed = sorted(order[: max(1, len(chunks) - int(len(chunks) * (1 - share)))])
    stretch = min(1.5, max(1.0, room / len(tokens)))
    injected: dict[int, int] = {}
    place = before = 0
    for number, index in enumerate(revealed):
        start, end = chunks[index]
        gap = int((start - before) * stretch)
        place += gap if number == 0 else min(gap, max_gap)
        if place + end - start > room:
            break
        injected |= {place + i: tokens[start + i] for i in range(end - start)}
        place, before = place + end - start, end
    return injected


def least_sure(entropy: Tensor, hint: Tensor, share: float) -> Tensor:
    """(N, L) bool: of each row's hint tokens the share with the highest entropy, at least one where there is any.

    Args:
        entropy: (N, L) nats.
        hint: (N, L) bool.
        share: in (0, 1].
    """
    count = (hint.sum(-1, keepdim=True) * share).floor().long().clamp(min=1)
    rank = entropy.masked_fill(~hint, float("-inf")).argsort(stable=True, dim=-1, descending=True).argsort(-1)
    return torch.logical_and(hint, rank < count)
