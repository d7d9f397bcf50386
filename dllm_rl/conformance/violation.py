"""How a check says that a contract is broken."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dllm_rl.errors import UserError
from dllm_rl.registry import Kind, label


class Violation(Exception):
    """A broken contract; the message is the counterexample."""


class NotCheckable(UserError):
    """A plugin that cannot be tried here; the message says what it lacks."""


def require(holds: object, counterexample: str) -> None:
    """Raise Violation unless the condition holds."""
    if not holds:
        raise Violation(counterexample)


def no_options(kind: Kind, name: str, options: Mapping[str, Any]) -> None:
    """Refuse options of a plugin that has none."""
    if options:
        raise UserError(f"{label(kind, name)} takes no options, got {', '.join(options)}")
