"""Runs every check of a kind against one plugin."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from dllm_rl.conformance import (
    algorithms,
    caches,
    engines,
    families,
    rewards,
    rollouters,
    strategies,
    tasks,
    transports,
)
from dllm_rl.conformance.violation import Violation
from dllm_rl.errors import UserError
from dllm_rl.registry import Kind

_MODULES: Mapping[Kind, Any] = {
    "algorithms": algorithms,
    "strategies": strategies,
    "engines": engines,
    "rewards": rewards,
    "tasks": tasks,
    "families": families,
    "rollouters": rollouters,
    "transports": transports,
    "caches": caches,
}


def _checks(module: Any) -> tuple[Callable[..., None], ...]:
    """The functions of a module whose first parameter is the subject, in their order."""
    return tuple(
        f for f in vars(module).values() if inspect.isfunction(f) and "subject" in inspect.signature(f).parameters
    )


SUBJECTS: Mapping[Kind, Callable[[str, Mapping[str, Any]], Any]] = {k: m.Subject for k, m in _MODULES.items()}
CHECKS: Mapping[Kind, tuple[Callable[..., None], ...]] = {k: _checks(m) for k, m in _MODULES.items()}


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check.

    Attributes:
        check: its name.
        law: what has to hold, in one sentence.
        problem: how the plugin breaks it, or None.
    """

    check: str
    law: str
    problem: str | None


def hold(check: Callable[..., None], subject: Any) -> None:
    """Run a check; one that is about a case of the subject, with each of them."""
    about_cases = len(inspect.signature(check).parameters) > 1
    for case in subject.cases() if about_cases else [()]:
        check(subject, *case)


def check_plugin(kind: Kind, name: str, options: Mapping[str, Any]) -> Iterator[Finding]:
    """Hold one plugin to its contract, one finding after the other.

    Args:
        kind: what it is.
        name: entry-point name or "package.module:Name".
        options: fields of its Config.
    Raises:
        ValueError: an unknown plugin, or options that its Config refuses.
    """
    subject = SUBJECTS[kind](name, options)
    try:
        for check in CHECKS[kind]:
            law = " ".join((inspect.getdoc(check) or "").split())
            try:
                hold(check, subject)
            except Violation as violation:
                yield Finding(check.__name__, law, str(violation))
            except Exception as error:  # a plugin may fail in any way; that is what the suite is there to report
                raised = "" if isinstance(error, UserError) else f"raised {type(error).__name__}: "
                yield Finding(check.__name__, law, f"{raised}{error}")
            else:
                yield Finding(check.__name__, law, None)
    finally:
        close = getattr(subject, "close", None)
        if close is not None:
            close()
