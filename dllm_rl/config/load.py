"""From a YAML file and dotted overrides to a validated Config, with errors that name the nearest valid key."""

from __future__ import annotations

import copy
import re
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from dllm_rl.config.schema import Config
from dllm_rl.config.section import flatten
from dllm_rl.errors import UserError, nearest


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply ``extends`` and overrides, validate.

    Args:
        path: the YAML file. Its optional top-level ``extends: other.yaml`` (relative to the file) is read first and
            overlaid key by key.
        overrides: ``a.b.c=value`` strings; the value is YAML. ``rewards.0.weight=2`` reaches into lists.
    Raises:
        UserError: one line per problem: which key, what is wrong, what is allowed.
    """
    return validate(read_values(path, overrides))


def read_values(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Sections with overrides, not validated yet.

    Args:
        source: see load_config, or the sections themselves, which are not changed.
        overrides: see load_config.
    Raises:
        UserError: see load_config.
    """
    values = copy.deepcopy(dict(source)) if isinstance(source, Mapping) else _read(Path(source), seen=())
    for override in overrides:
        _apply(values, override)
    return values


def validate(values: Mapping[str, Any]) -> Config:
    """A Config from plain values; ValueError in our words otherwise."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise UserError("; ".join(dict.fromkeys(_explain(dict(e)) for e in error.errors()))) from None


def dump(config: Config) -> str:
    """The configuration as YAML that load_config accepts."""
    text: str = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, width=120)
    return text


def resumable(stored: Path, config: Config) -> list[str]:
    """What a run's new configuration changes, for the user to see.

    Args:
        stored: config.yaml of the run folder.
        config: what is asked for now.
    Returns:
        one text per changed key, "learner.lr 0.001 -> 0.0001"; the length of the run and where it runs do not count.
    Raises:
        UserError: a changed key that decides what the checkpoint holds.
    """
    old, new = (flatten(c.model_dump(mode="json")) for c in (load_config(stored), config))
    changed = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    changed = [key for key in changed if not key.startswith(("provenance", "run.output", "run.steps", "model.device"))]
    texts = {key: f"{key} {old.get(key)!r} -> {new.get(key)!r}" for key in changed}
    fixed = [text for key, text in texts.items() if key.startswith("model.") or key == "run.seed"]
    if fixed:
        raise UserError(f"a resumed run keeps its model and seed, but {'; '.join(fixed)}; set another run.name instead")
    return list(texts.values())


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML with duplicate keys refused (PyYAML silently keeps the last) and 1e-6 read as a number."""


def _unique_mapping(loader: _UniqueKeyLoader, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
    keys = [loader.construct_object(key, deep=True) for key, _ in node.value]
    for key in keys:
        if keys.count(key) > 1:
            raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is given twice", node.start_mark)
    return dict(zip(keys, (loader.construct_object(value, deep=True) for _, value in node.value), strict=True))


_UniqueKeyLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _unique_mapping)
# YAML 1.1 reads 1e-6 (no dot) as a string; every user writes learning rates like that.
_UniqueKeyLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _parse(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_UniqueKeyLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark is not None else ""
        raise UserError(f"{where}{line}: not valid YAML: {getattr(error, 'problem', None) or error}") from None


def _read(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    if not path.is_file():
        others = [p.name for p in path.parent.glob("*.yaml")]
        hint = nearest(path.name, others, where=f"{path.parent}/", list_known=False)
        raise UserError(f"no configuration file '{path}'{hint}")
    if path.resolve() in seen:
        raise UserError(f"'{path}' extends itself, by way of {' -> '.join(p.name for p in seen)}")
    values = _parse(path.read_text(encoding="utf-8"), str(path))
    if not isinstance(values, dict):
        raise UserError(f"'{path}' holds {type(values).__name__}, expected sections such as 'run:' and 'model:'")
    parent = values.pop("extends", None)
    if parent is None:
        return values
    return _overlay(_read(path.parent / str(parent), (*seen, path.resolve())), values)


def _overlay(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in top.items():
        below = base.get(key)
        if isinstance(value, dict) and isinstance(below, dict) and not _renames(key, below, value):
            merged[key] = _overlay(below, value)
        else:
            merged[key] = value
    return merged


def _renames(key: str, below: dict[str, Any], value: dict[str, Any]) -> bool:
    """Whether it is another plugin: the options of the first one mean nothing to it. A run's name is not a plugin's."""
    return key != "run" and "name" in value and below.get("name", value["name"]) != value["name"]


def _apply(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise UserError(f"override '{override}': expected section.key=value, for example learner.lr=2e-6")
    node: Any = values
    *parents, last = key.strip().split(".")
    for part in parents:
        if isinstance(node, list):
            node = node[_position(node, part, key)]
        elif isinstance(node, dict):
            if node.get(part) is None:
                node[part] = {}
            node = node[part]
        else:
            raise UserError(f"override '{key}': '{part}' is inside a plain value, not a section")
    value = _parse(text, f"override '{key}'")
    if isinstance(node, list):
        node[_position(node, last, key)] = value
    elif isinstance(node, dict):
        changed_plugin = last == "name" and "name" in node and node["name"] != value and parents != ["run"]
        if changed_plugin:
            node.clear()  # as in _overlay: another plugin, other options
        node[last] = value
    else:
        raise UserError(f"override '{key}': '{'.'.join(parents)}' is a plain value, not a section")


def _position(items: list[Any], part: str, key: str) -> int:
    if not part.isdigit() or int(part) >= len(items):
        raise UserError(f"override '{key}': '{part}' is not a position in a list of {len(items)}")
    return int(part)


def _explain(error: dict[str, Any]) -> str:
    location = [str(part) for part in error["loc"]]
    key = ".".join(location)
    if error["type"] == "extra_forbidden":
        where = "".join(f"{part}." for part in location[:-1])
        return f"unknown key '{key}'{nearest(location[-1], _keys_at(location[:-1]), where=where)}"
    if error["type"] == "missing":
        return f"missing key '{key}'"
    message = str(error["msg"]).removeprefix("Value error, ")
    value = error.get("input")
    shown = f" = {value!r}" if not isinstance(value, dict | list | BaseModel) else ""
    return f"{key}{shown}: {message[0].lower()}{message[1:]}" if key else message


def _keys_at(location: Sequence[str]) -> list[str]:
    model: Any = Config
    for part in location:
        if not part.isdigit():
            model = _model_in(model.model_fields[part].annotation)
    return list(model.model_fields)


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((m for m in map(_model_in, typing.get_args(annotation)) if m is not None), None)
