"""Finds plugins by entry-point name, "my_file.py:Name" or "package.module:Name". The only place that imports them.

What a plugin of other people raises becomes a UserError that names it; our own keep their traceback.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
import sysconfig
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from dllm_rl.errors import RunStopped, UserError, is_out_of_memory, nearest

Kind = Literal[
    "algorithms", "engines", "strategies", "rewards", "tasks", "rollouters", "families", "transports", "caches"
]

OWNER = "dllm-rl"
_RENAMED: dict[tuple[Kind, str], str] = {("tasks", "jsonl"): "rows"}  # ours that have another name now
_OWNED_PACKAGES = ("algorithms", "rollouts", "rewards")
_NOT_THE_USERS = (*{sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")}, str(Path(__file__).parent))

_searched: list[str] = []  # folders that search() has put on the path


def search(folders: Iterable[str]) -> None:
    """Look for plugins in folders too, the first one first; after whatever is installed, which they must not shadow.

    They are put on ``sys.path``, which reward workers and actors on a Ray cluster are given as their own.
    """
    for folder in reversed([str(Path(folder).expanduser().absolute()) for folder in folders]):
        if folder in _searched:  # of an earlier configuration: this one's go first
            _searched.remove(folder)
            sys.path[:] = [entry for entry in sys.path if entry != folder]
        if folder not in sys.path:
            sys.path.append(folder)
        _searched.append(folder)


def names(kind: Kind) -> list[str]:
    """Entry-point names registered for a kind, sorted."""
    return sorted({point.name for point in entry_points(group=f"dllm_rl.{kind}")})


def load(kind: Kind, name: str) -> Any:
    """The plugin class or function behind a name.

    Args:
        kind: what is asked for.
        name: an entry-point name of group ``dllm_rl.<kind>``, a dotted path ``package.module:Attribute``, or a file and
            what it defines, ``my_file.py:Attribute``; relative ones are looked for in the folders of search(), the
            current directory and the rest of sys.path.
    Raises:
        UserError: unknown name (the nearest one is named), module or attribute that cannot be found, or a user's
            folder that shadows one of our packages.
    """
    if ":" in name:
        return _load_path(kind, name)
    if (kind, name) in _RENAMED:
        raise _unknown(kind, name)
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
    if (kind, name) in _RENAMED or (":" not in name and name not in names(kind)):
        raise _unknown(kind, name)


def _unknown(kind: Kind, name: str) -> UserError:
    if (kind, name) in _RENAMED:
        return UserError(f"unknown {label(kind, name)}; it is '{_RENAMED[kind, name]}' now, with the same options")
    if name.endswith(".py"):
        return UserError(f"{label(kind, name)}: say what in that file: '{name}:my_name'")
    own = "your own: 'my_file.py:Name' or 'package.module:Name'"
    return UserError(f"unknown {label(kind, name)}{nearest(name, names(kind))}; {own}")


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
    module_name, _, attribute = path.rpartition(":")
    by_file = module_name.endswith(".py")
    file = _find(kind, path, module_name) if by_file else Path()
    with plugin_boundary(kind, path, f"importing '{module_name}'", "" if by_file else module_name):
        try:
            module = _import_file(file) if by_file else importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if by_file or (error.name and not (module_name == error.name or module_name.startswith(error.name + "."))):
                raise  # the plugin is there and misses a dependency of its own
            raise UserError(f"{label(kind, path)}: no module '{error.name}'; is its folder on PYTHONPATH?") from error
    if not hasattr(module, attribute):
        hint = nearest(attribute, vars(module), list_known=False)
        what = "file" if by_file else "module"
        raise UserError(f"{label(kind, path)}: {what} '{module_name}' has no '{attribute}'{hint}")
    return getattr(module, attribute)


def _find(kind: Kind, path: str, name: str) -> Path:
    """The file of a plugin; workers, whose path ends with the driver's, find the same one."""
    library = {*sysconfig.get_paths().values()}
    own = [folder for folder in reversed(sys.path) if folder not in library]
    for folder in (*own, "."):
        file = Path(folder, Path(name).expanduser()).absolute()
        if file.is_file():
            return file
    near = [other.name for folder in (*_searched, ".") for other in Path(folder, name).parent.glob("*.py")]
    where = ", ".join(f"'{folder}'" for folder in dict.fromkeys((*reversed(_searched), str(Path.cwd()))))
    raise UserError(
        f"{label(kind, path)}: no file '{name}' in {where}{nearest(Path(name).name, near, list_known=False)}"
    )


def _import_file(file: Path) -> ModuleType:
    """The module of a file, under a name that no other module has; what lies beside it can be imported by it."""
    name = f"{file.stem}_{hashlib.blake2b(str(file).encode(), digest_size=6).hexdigest()}"
    if name not in sys.modules:
        search([str(file.parent)])
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None and spec.loader is not None, "a .py file has a loader"
        module = sys.modules[name] = importlib.util.module_from_spec(spec)  # known before it runs, for its dataclasses
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def _check_owner(module_name: str) -> None:
    root = module_name.split(".")[0]
    package = importlib.import_module(root)
    if not is_ours(module_name):
        where = list(getattr(package, "__path__", [])) or [getattr(package, "__file__", "?")]
        raise UserError(
            f"the folder '{where[0]}' shadows dllm-rl's own package '{root}'; rename it, or run from another directory"
        )
