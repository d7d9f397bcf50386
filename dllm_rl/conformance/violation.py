"""How a check says that a contract is broken."""

from __future__ import annotations


class Violation(Exception):
    """A broken contract; the message is the counterexample."""


def require(holds: object, counterexample: str) -> None:
    """Raise Violation unless the condition holds."""
    if not holds:
        raise Violation(counterexample)
