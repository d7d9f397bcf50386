"""Builds plugins from a name and options, checking the options against the plugin's own Config."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from typing import Any

from dllm_rl import registry
from dllm_rl.errors import UserError
from dllm_rl.registry import Kind

# How a configuration file addresses the options of a plugin: error messages use the user's own words.
_SECTIONS: Mapping[Kind, str] = {
    "algorithms": "algorithm",
    "engines": "engine",
    "strategies": "sampling.strategy",
    "rewards": "rewards.{name}",
    "tasks": "data.task",
    "rollouters": "rollout.rollouter",
}


def build(kind: Kind, name: str, options: Mapping[str, Any]) -> Any:
    """An instance of a plugin; for a plain function (a reward), the function.

    Args:
        kind: what it is.
        name: entry-point name or "package.module:Name".
        options: fields of its Config.
    Raises:
        UserError: unknown plugin or option (the nearest is named), wrong type, or a value that its Config refuses.
    """
    plugin, config = configure(kind, name, options)
    return plugin if config is None else plugin(config)


def configure(kind: Kind, name: str, options: Mapping[str, Any]) -> tuple[Any, Any]:
    """(class, Config) of a plugin, checked but not yet built; (function, None) for a plain function.

    Args and errors as in build.
    """
    plugin = registry.load(kind, name)
    where = _SECTIONS[kind].format(name=name)
    if not isinstance(plugin, type):
        if not callable(plugin):
            raise UserError(f"{where}: '{name}' is neither a class nor a function")
        if options:
            raise UserError(f"{where} is a plain function and takes no options, got {', '.join(options)}")
        return plugin, None
    config_class = getattr(plugin, "Config", None)
    if not isinstance(config_class, type) or not dataclasses.is_dataclass(config_class):
        raise UserError(f"{where}: class {plugin.__name__} has no nested dataclass Config; see dllm_rl/protocols.py")
    known = {field.name: field for field in dataclasses.fields(config_class)}
    hints = typing.get_type_hints(config_class)
    values: dict[str, Any] = {}
    for key, value in options.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            hint = f"nearest is '{where}.{near[0]}'" if near else f"allowed: {', '.join(known) or 'none'}"
            raise UserError(f"unknown key '{where}.{key}'; {hint}")
        values[key] = _checked(f"{where}.{key}", value, hints[key])
    for f in known.values():
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING and f.name not in values:
            raise UserError(f"missing key '{where}.{f.name}': must be {_describe(hints[f.name])}")
    try:
        return plugin, config_class(**values)
    except ValueError as error:
        names_the_field = str(error).partition(" = ")[0] in known
        raise UserError(f"{where}{'.' if names_the_field else ': '}{error}") from None


def _checked(where: str, value: Any, annotation: Any) -> Any:
    """The value, converted where YAML is looser than Python (1 for 1.0, a list for a tuple)."""
    matched, converted = _match(value, annotation)
    if not matched:
        raise UserError(f"{where} = {value!r}: must be {_describe(annotation)}")
    return converted


def _match(value: Any, annotation: Any) -> tuple[bool, Any]:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is Any:
        return True, value
    if origin in (typing.Union, types.UnionType):
        return next((m for m in (_match(value, a) for a in arguments) if m[0]), (False, value))
    if origin is typing.Literal:
        return value in arguments and not (isinstance(value, bool) and bool not in map(type, arguments)), value
    if origin in (list, tuple):
        if not isinstance(value, list | tuple):
            return False, value
        inner = [_match(item, arguments[0] if arguments else Any) for item in value]
        return all(ok for ok, _ in inner), origin(item for _, item in inner)
    if annotation is float:
        fits = isinstance(value, int | float) and not isinstance(value, bool)
        return fits, float(value) if fits else value
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool), value
    if annotation is None or annotation is type(None):
        return value is None, value
    kind = origin or annotation
    return isinstance(kind, type) and isinstance(value, kind), value


def _describe(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return "one of " + ", ".join(map(repr, arguments))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(_describe, arguments))
    if annotation is type(None):
        return "null"
    names = {int: "an integer", float: "a number", str: "a text", bool: "true or false"}
    return names.get(annotation, str(getattr(annotation, "__name__", annotation)))
