"""Range checks that the Configs of plugins share; each names the field, its value and what is allowed."""

from __future__ import annotations

from dllm_rl.errors import UserError


def positive(**values: float) -> None:
    """Every value is > 0."""
    for name, value in values.items():
        if not value > 0:
            raise UserError(f"{name} = {value}: must be > 0")


def not_negative(**values: float) -> None:
    """Every value is >= 0."""
    for name, value in values.items():
        if not value >= 0:
            raise UserError(f"{name} = {value}: must be >= 0 (0 = off)")


def at_least_one(**values: int) -> None:
    """Every count is >= 1."""
    for name, value in values.items():
        if value < 1:
            raise UserError(f"{name} = {value}: must be at least 1")
