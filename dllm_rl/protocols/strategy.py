"""The contract of unmasking strategies."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidates:
    """What a strategy may choose from, W positions for each of N rows.

    Attributes:
        eligible: (N, W) bool; positions that may be committed now (masked, in the row's active block).
        token: (N, W) int64 proposed token.
        logp: (N, W) float32 nats; log p(proposed token), the confidence, under the distribution that
            Sampling.confidence names; -inf where not eligible and for Sampling.defer_tokens.
        entropy: (N, W) float32 nats of that distribution; 0 where not eligible.
        margin: (N, W) float32 probability of its best minus its second best token; 0 where not eligible.
        noise: (N, W) float64 uniform in (0, 1), keyed by (row, forward, position).
        count: (N,) int64 positions to commit for count-based strategies, by Sampling.schedule; <= number eligible.
        context: (N, W) bool; positions of the completion canvas that the forward computed.
        masked: (N, W) bool; every masked position of the context, in the active block or after it. A strategy that
            reads_canvas gets token, logp, entropy and margin at all of them.
        time: (N,) float32; forwards that the row has taken, divided by the tokens of its canvas.
    """

    eligible: Tensor
    token: Tensor
    logp: Tensor
    entropy: Tensor
    margin: Tensor
    noise: Tensor
    count: Tensor
    context: Tensor
    masked: Tensor
    time: Tensor


class UnmaskingStrategy:
    """Decides which masked positions to commit at this forward.

    Attributes:
        revises: True if committed tokens may change later; trajectories are then only valid as event lists.
        samples: True if the choice draws from candidates.noise, so that greedy samples of a prompt can differ.
        reads_canvas: True if it looks at positions beyond the active block; costs their unembedding.
        policy: the network that makes the choice and can be trained, if there is one. Then log_prob, bind, save and
            load are there too.
    """

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config:
        """Options of the strategy."""

    revises: ClassVar[bool] = False
    samples: bool = False
    reads_canvas: ClassVar[bool] = False
    policy: nn.Module | None = None

    def __init__(self, config: Any) -> None:
        self.config = config

    def select(self, candidates: Candidates) -> Tensor:
        """(N, W) bool, a subset of eligible, at least one in every row that has an eligible position.

        A strategy that chooses one position after another returns int64 instead: the place in its order from 1, else 0.
        Vectorised over rows (no Python loop per row); a row's result depends on that row alone.
        """
        raise NotImplementedError

    def log_prob(self, candidates: Candidates, order: Tensor) -> Tensor:
        """(N,) nats, differentiable in the policy: log-probability that select() gives this order (N, W) int64.

        Reads eligible, logp, context, masked and time of the candidates.
        """
        raise NotImplementedError

    def bind(self, vocabulary: str, device: torch.device, *, trained_here: bool) -> None:
        """Called once with a digest of the model's vocabulary, its device, and whether this run trains the policy.

        Raises:
            ValueError: it cannot work with them.
        """

    def save(self, folder: Path) -> None:
        """Write the policy into a folder."""
        raise NotImplementedError

    def load(self, folder: Path) -> None:
        """Restore what save wrote."""
        raise NotImplementedError
