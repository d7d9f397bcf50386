"""Finds plugins by entry-point name or by "package.module:Attribute". The only place that imports them."""

from __future__ import annotations

import difflib
import importlib
import sys
from importlib.metadata import entry_points
from types import ModuleType
from typing import Any, Literal, get_args

from dllm_rl.errors import UserError

Kind = Literal["algorithms", "engines", "strategies", "rewards", "tasks", "rollouters"]
KINDS: tuple[Kind, ...] = get_args(Kind)
OWNER = "dllm-rl"
_OWNED_PACKAGES = ("algorithms", "rollouts", "rewards")


def names(kind: Kind) -> list[str]:
    """Entry-point names registered for a kind, sorted."""
    return sorted({point.name for point in entry_points(group=f"dllm_rl.{kind}")})


def load(kind: Kind, name: str) -> Any:
    """The plugin class or function behind a name.

    Args:
        kind: what is asked for.
        name: an entry-point name of group ``dllm_rl.<kind>``, or a dotted path ``package.module:Attribute``.
    Raises:
        UserError: unknown name (the nearest one is named), module or attribute that cannot be found, or a user's
            folder that shadows one of our packages.
    """
    if ":" in name:
        return _load_path(kind, name)
    for point in entry_points(group=f"dllm_rl.{kind}"):
        if point.name == name:
            if point.dist is not None and point.dist.name == OWNER:
                _check_owner(point.value.split(":")[0])
            return _load_path(kind, point.value)
    known = names(kind)
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(known)}"
    raise UserError(f"unknown {_singular(kind)} '{name}'; {hint} Your own: 'package.module:Name'")


def _load_path(kind: Kind, path: str) -> Any:
    module_name, _, attribute = path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and not (module_name == error.name or module_name.startswith(error.name + ".")):
            raise  # the plugin exists and misses a dependency of its own: show its own traceback
        raise UserError(
            f"{_singular(kind)} '{path}': no module '{error.name}'; is its folder on PYTHONPATH?"
        ) from error
    if not hasattr(module, attribute):
        near = difflib.get_close_matches(attribute, vars(module), n=1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        raise UserError(f"{_singular(kind)} '{path}': module '{module_name}' has no '{attribute}'{hint}")
    return getattr(module, attribute)


def _check_owner(module_name: str) -> None:
    root = module_name.split(".")[0]
    if root not in _OWNED_PACKAGES:
        return
    package: ModuleType | None = sys.modules.get(root)
    if package is None:
        package = importlib.import_module(root)
    if getattr(package, "OWNER", None) != OWNER:
        where = list(getattr(package, "__path__", [])) or [getattr(package, "__file__", "?")]
        raise UserError(
            f"the folder '{where[0]}' shadows dllm-rl's own package '{root}'; rename it, or run from another directory"
        )


def _singular(kind: Kind) -> str:
    return {"strategies": "strategy"}.get(kind, kind[:-1])
