"""Finds plugins by entry-point name or by "package.module:Attribute". The only place that imports them.

What a plugin of other people raises becomes a UserError that names it; our own keep their traceback.
"""

from __future__ import annotations

import importlib
import sys
import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Literal

from dllm_rl.errors import RunStopped, UserError, is_out_of_memory, nearest

Kind = Literal[
    "algorithms", "engines", "strategies", "rewards", "tasks", "rollouters", "families", "transports", "caches"
]

OWNER = "dllm-rl"
_OWNED_PACKAGES = ("algorithms", "rollouts", "rewards")
_NOT_THE_USERS = (*{sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")}, str(Path(__file__).parent))


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
    raise _unknown(kind, name)


def require_known(kind: Kind, name: str) -> None:
    """Refuse a name that no distribution registers.

    Raises:
        UserError: naming the nearest one.
    """
    if ":" not in name and name not in names(kind):
        raise _unknown(kind, name)


def _unknown(kind: Kind, name: str) -> UserError:
    return UserError(f"unknown {label(kind, name)}{nearest(name, names(kind))}; your own: 'package.module:Name'")


def label(kind: Kind, name: str) -> str:
    """What error messages call a plugin: "strategy 'entropy'"."""
    singular = {"strategies": "strategy", "families": "model family"}.get(kind, kind[:-1])
    return f"{singular} '{name}'"


def is_ours(module_name: str) -> bool:
    """Whether a module that has been imported is part of this distribution."""
    root = module_name.split(".")[0]
    return root == "dllm_rl" or (root in _OWNED_PACKAGES and getattr(sys.modules.get(root), "OWNER", None) == OWNER)


@contextmanager
def plugin_boundary(kind: Kind, name: str, clause: str, module_name: str) -> Iterator[None]:
    """Call other people's code: what it raises becomes a UserError that names the plugin and the clause.

    Running out of memory is nobody's fault and passes, as do errors that are in one line already.

    Args:
        kind: of the plugin.
        name: of the plugin, as the user wrote it.
        clause: what is called, "loss()" for example.
        module_name: where the plugin is defined; what our own raise passes.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError | RunStopped) or is_out_of_memory(error) or is_ours(module_name):
            raise
        raise UserError(
            f"{label(kind, name)}: {clause} raised {type(error).__name__}: {' '.join(str(error).split())}"
            f"{_place(error)}; DLLM_RL_DEBUG=1 shows the traceback"
        ) from error


def _place(error: Exception) -> str:
    """Where it was raised, " (my_rewards.py, line 3)": the innermost line outside Python itself and packages.

    Args:
        error: whose traceback is looked at; a SyntaxError says it in its message.
    """
    if isinstance(error, SyntaxError):
        return ""
    frames = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    own = [(file, line) for file, line in frames if file[0] != "<" and not file.startswith(_NOT_THE_USERS)]
    return f" ({own[-1][0]}, line {own[-1][1]})" if own else ""


def _load_path(kind: Kind, path: str) -> Any:
    module_name, _, attribute = path.partition(":")
    with plugin_boundary(kind, path, f"importing '{module_name}'", module_name):
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name and not (module_name == error.name or module_name.startswith(error.name + ".")):
                raise  # the plugin is there and misses a dependency of its own
            raise UserError(f"{label(kind, path)}: no module '{error.name}'; is its folder on PYTHONPATH?") from error
    if not hasattr(module, attribute):
        hint = nearest(attribute, vars(module), list_known=False)
        raise UserError(f"{label(kind, path)}: module '{module_name}' has no '{attribute}'{hint}")
    return getattr(module, attribute)


def _check_owner(module_name: str) -> None:
    root = module_name.split(".")[0]
    package = importlib.import_module(root)
    if not is_ours(module_name):
        where = list(getattr(package, "__path__", [])) or [getattr(package, "__file__", "?")]
        raise UserError(
            f"the folder '{where[0]}' shadows dllm-rl's own package '{root}'; rename it, or run from another directory"
        )
