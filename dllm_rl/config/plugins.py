"""Builds plugins from a name and options, checking the options against the plugin's own Config."""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from dllm_rl import registry
from dllm_rl.errors import UserError, nearest
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
        UserError: unknown plugin or option (the nearest is named), wrong type, or a value that its Config refuses; and
            later, at a call, what a plugin of other people raises or returns against its contract.
    """
    plugin, config = configure(kind, name, options)
    if config is None:
        return plugin
    made = guarded(kind, name, plugin)
    with registry.plugin_boundary(kind, name, "__init__()", plugin.__module__):
        return made(config)


def engine_class(name: str, options: Mapping[str, Any]) -> tuple[Any, Any]:
    """(class, Config) of an engine, which is made later, where it runs; see build."""
    plugin, config = configure("engines", name, options)
    return guarded("engines", name, plugin), config


def plugin_class(kind: Kind, name: str) -> Any:
    """The class of a plugin without options (a transport, a cache); see guarded."""
    return guarded(kind, name, registry.load(kind, name))


def guarded(kind: Kind, name: str, plugin: Any) -> Any:
    """A plugin class of ours as it is; of other people, held to its contract at every call."""
    if kind == "rewards" or registry.is_ours(
        getattr(plugin, "__module__", "")
    ):  # rewards: the pool holds them to it, without torch
        return plugin
    from dllm_rl.config.contracts import guard

    return guard(kind, name, plugin)


def configure(kind: Kind, name: str, options: Mapping[str, Any]) -> tuple[Any, Any]:
    """(class, Config) of a plugin, checked but not yet built; (function, None) for a plain function.

    Args and errors as in build.
    """
    plugin = registry.load(kind, name)
    where = _SECTIONS[kind].format(name=name)
    if not isinstance(plugin, type):
        if kind != "rewards" or not callable(plugin):
            raise UserError(f"{where}: '{name}' is not a class{' or a function' if kind == 'rewards' else ''}")
        if options:
            raise UserError(f"{where} is a plain function and takes no options, got {', '.join(options)}")
        return plugin, None
    config_class = getattr(plugin, "Config", None)
    if not isinstance(config_class, type) or not dataclasses.is_dataclass(config_class):
        raise UserError(f"{where}: class {plugin.__name__} has no nested dataclass Config; see dllm_rl/protocols")
    with registry.plugin_boundary(kind, name, "Config", plugin.__module__):
        return plugin, _configured(where, config_class, options)


def _configured(where: str, config_class: type, options: Mapping[str, Any]) -> Any:
    known = {field.name: field for field in dataclasses.fields(config_class)}
    hints = typing.get_type_hints(config_class, include_extras=True)
    values: dict[str, Any] = {}
    for key, value in options.items():
        if key not in known:
            raise UserError(f"unknown key '{where}.{key}'{nearest(key, known, where=f'{where}.')}")
        values[key] = _checked(f"{where}.{key}", value, hints[key])
    for f in known.values():
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING and f.name not in values:
            raise UserError(f"missing key '{where}.{f.name}'")
    try:
        return config_class(**values)
    except ValueError as error:
        names_the_field = str(error).partition(" = ")[0] in known
        raise UserError(f"{where}{'.' if names_the_field else ': '}{error}") from None


def _checked(where: str, value: Any, annotation: Any) -> Any:
    """The value, converted where YAML is looser than Python (1 for 1.0, a list for a tuple)."""
    from pydantic import TypeAdapter, ValidationError  # here: reward workers start fast

    if annotation is Any:
        return value
    adapter: Any = TypeAdapter(
        annotation, config={"strict": True, "arbitrary_types_allowed": True, "allow_inf_nan": False}
    )
    try:
        try:
            found = adapter.validate_json(json.dumps(value))  # JSON has lists alone, so they are taken for tuples
        except TypeError:  # not JSON: a date, say
            found = adapter.validate_python(value)
    except ValidationError as error:
        raise UserError(_refusal(where, value, annotation, error.errors())) from None
    if isinstance(value, bool) != isinstance(found, bool):  # a Literal[1] takes True
        raise UserError(f"{where} = {value!r}: must be {found!r}, not true or false")
    return found


def _refusal(where: str, value: Any, annotation: Any, errors: Sequence[Mapping[str, Any]]) -> str:
    """One line of what pydantic says: one error, or one for each member of a union."""
    place = [part for part in errors[0]["loc"] if isinstance(part, int)]  # further parts name members of unions
    for part in place:
        where, value = f"{where}.{part}", value[part]
    null = ["null"] if type(None) in typing.get_args(annotation) and not place else []
    texts = " or ".join([*dict.fromkeys(str(e["msg"]).removeprefix("Value error, ") for e in errors), *null])
    must = texts.replace("Input should", "must", 1).replace("Input should be ", "")
    return f"{where} = {value!r}: {must[0].lower()}{must[1:]}"
