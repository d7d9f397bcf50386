"""What every unmasking strategy must keep to; see dllm_rl.protocols.strategy."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dllm_rl.config.plugins import build
from dllm_rl.conformance.violation import require
from dllm_rl.protocols.strategy import Candidates, UnmaskingStrategy
from dllm_rl.seeding import generator_for

ROWS, WIDTH = 64, 10


class Subject:
    """A strategy and the candidates it chooses from."""

    def __init__(self, name: str, options: Mapping[str, Any]) -> None:
        self.strategy: UnmaskingStrategy = build("strategies", name, options)

    def cases(self) -> list[tuple[Candidates]]:
        """Random ones, and extreme ones: all tied, tokens of probability 0 and 1."""
        generator = generator_for(0, "conformance", "strategies")
        shape = (ROWS, WIDTH)
        masked = torch.rand(shape, generator=generator) < torch.linspace(0, 1, ROWS)[:, None]
        left = masked.sum(-1)
        drawn = Candidates(
            eligible=masked,
            token=torch.randint(3, 20, shape, generator=generator),
            logp=(-3 * torch.rand(shape, generator=generator)).masked_fill(~masked, float("-inf")),
            entropy=(2 * torch.rand(shape, generator=generator)).masked_fill(~masked, 0.0),
            margin=torch.rand(shape, generator=generator).masked_fill(~masked, 0.0),
            noise=torch.rand(shape, generator=generator, dtype=torch.float64).clamp(1e-9, 1 - 1e-9),
            count=torch.minimum(left, torch.randint(1, 5, (ROWS,), generator=generator)),
            context=torch.ones(shape, dtype=torch.bool),
            masked=masked,
            time=torch.rand(ROWS, generator=generator),
        )

        def all_equal(logp: float) -> Candidates:
            return dataclasses.replace(
                drawn,
                logp=torch.full(shape, logp).masked_fill(~masked, float("-inf")),
                entropy=torch.zeros(shape),
                margin=torch.zeros(shape),
            )

        return [(drawn,), *((all_equal(logp),) for logp in (0.0, -1.0, float("-inf")))]


def _rows(candidates: Candidates, rows: Tensor) -> Candidates:
    fields = {f.name: getattr(candidates, f.name)[rows] for f in dataclasses.fields(Candidates)}
    return Candidates(**fields)


def only_hidden_positions_are_chosen(subject: Subject, candidates: Candidates) -> None:
    """select() gives an (N, W) bool, or int64 numbers, that are a subset of eligible."""
    chosen = subject.strategy.select(candidates)
    require(
        chosen.dtype in (torch.bool, torch.int64) and chosen.shape == candidates.eligible.shape,
        f"{chosen.dtype} {chosen.shape}",
    )
    outside = ((chosen > 0) & ~candidates.eligible).nonzero()
    require(not len(outside), f"(row, position) {outside[:1].tolist()} is not eligible")


def every_row_moves_on(subject: Subject, candidates: Candidates) -> None:
    """A row with masked positions gets at least one chosen, whatever the figures: otherwise it would decode forever."""
    stuck = (candidates.eligible.any(-1) & ~(subject.strategy.select(candidates) > 0).any(-1)).nonzero()
    require(not len(stuck), f"row {stuck[:1].tolist()} has masked positions and none is chosen")


def rows_do_not_see_each_other(subject: Subject, candidates: Candidates) -> None:
    """The choice of a row alone, or among others in another order, is its choice in the batch."""
    order = torch.arange(ROWS - 1, -1, -1)
    together = subject.strategy.select(candidates)
    turned = subject.strategy.select(_rows(candidates, order))
    require(torch.equal(together[order], turned), "rows in reverse order are chosen otherwise")
    for row in range(0, ROWS, 7):
        alone = subject.strategy.select(_rows(candidates, torch.tensor([row])))[0]
        require(
            torch.equal(alone, together[row]),
            f"row {row} alone gets {alone.nonzero().flatten().tolist()}, in the batch "
            f"{together[row].nonzero().flatten().tolist()}",
        )


def what_is_in_sight_does_not_matter(subject: Subject, candidates: Candidates) -> None:
    """Tokens at positions that are not masked do not change the choice."""
    other = dataclasses.replace(candidates, token=torch.where(candidates.eligible, candidates.token, 2))
    same = torch.equal(subject.strategy.select(candidates), subject.strategy.select(other))
    require(same, "other visible tokens give another choice")


def equal_candidates_give_equal_choices(subject: Subject) -> None:
    """Randomness comes from candidates.noise alone, and the candidates are left as they were."""
    for (candidates,), (fresh,) in zip(subject.cases(), subject.cases(), strict=True):
        first = subject.strategy.select(candidates)
        require(torch.equal(first, subject.strategy.select(candidates)), "two calls chose differently")
        for f in dataclasses.fields(Candidates):
            require(
                torch.equal(getattr(candidates, f.name), getattr(fresh, f.name)), f"candidates.{f.name} was changed"
            )
