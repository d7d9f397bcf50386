"""Soft penalty for completions that come close to the canvas' end.

    0                                   tokens <= max_tokens - margin
    (max_tokens - margin - tokens)/margin   in between
    -1                                  tokens >= max_tokens

Source: "soft overlong punishment", Yu et al. 2025 (DAPO), arXiv:2503.14476, Eq. 13.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dllm_rl.errors import UserError


class Length:
    """Between -1 (fills the limit) and 0 (short enough)."""

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config:
        """Options."""

        max_tokens: int = 256  # at this length the penalty is -1
        margin: int = 64  # the penalty starts this many tokens earlier

        def __post_init__(self) -> None:
            if not 1 <= self.margin <= self.max_tokens:
                raise UserError(f"margin = {self.margin}: must be in 1..max_tokens = {self.max_tokens}")

    def __init__(self, config: Config) -> None:
        self.config = config

    def __call__(
        self, prompts: list[Any], completions: list[str], *, completion_tokens: list[int], **columns: list[Any]
    ) -> list[float]:
        """One value per completion, from its length in tokens."""
        c = self.config
        return [max(-1.0, min(0.0, (c.max_tokens - c.margin - tokens) / c.margin)) for tokens in completion_tokens]
