"""From a YAML file and dotted overrides to a validated Config, with errors that name the nearest valid key."""

from __future__ import annotations

import copy
import re
import typing
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from dllm_rl.config.presets import with_preset
from dllm_rl.config.schema import Config
from dllm_rl.config.section import flatten
from dllm_rl.errors import UserError, first_line, nearest


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
        one text per changed key, "learner.lr 0.001 -> 0.0001"; where it runs does not count, and its length only
        where the learning rate depends on it.
    Raises:
        UserError: a changed key that decides what the checkpoint holds, or no readable configuration.
    """
    try:
        before = load_config(stored)
    except (UserError, UnicodeDecodeError) as error:
        raise UserError(
            f"the run's own configuration cannot be read ({first_line(error)}); to go on with the one given now, write "
            f"that into it: dllm-rl show-config CONFIG > {stored}"
        ) from error
    old, new = (flatten(c.model_dump(mode="json")) for c in (before, config))
    changed = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    silent: tuple[str, ...] = ("provenance", "run.output", "run.name", "model.device")
    if {before.learner.schedule, config.learner.schedule} == {"constant"} and config.learner.warmup_ratio is None:
        silent += ("run.steps",)
    changed = [key for key in changed if not key.startswith(silent)]
    texts = {key: f"{key} {old.get(key)!r} -> {new.get(key)!r}" for key in changed}
    fixed = [text for key, text in texts.items() if key.startswith("model.") or key == "run.seed"]
    if fixed:
        raise UserError(f"a resumed run keeps its model and seed, but {'; '.join(fixed)}; set another run.name instead")
    return list(texts.values())


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML with duplicate keys refused (PyYAML silently keeps the last) and 1e-6 read as a number."""


_MERGE = "tag:yaml.org,2002:merge"


def _unique_mapping(loader: _UniqueKeyLoader, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
    seen: set[Any] = set()
    for place, _ in node.value:
        key = "<<" if place.tag == _MERGE else loader.construct_object(place, deep=True)
        problem = "is given twice" if isinstance(key, Hashable) and key in seen else "cannot be a key"
        if problem == "is given twice" or not isinstance(key, Hashable):
            raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} {problem}", place.start_mark)
        seen.add(key)
    loader.flatten_mapping(node)  # what `<<` brings in comes first, so that the mapping's own keys win
    made = ([loader.construct_object(one, deep=True) for one in pair] for pair in node.value)
    return {key: value for key, value in made}


_UniqueKeyLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _unique_mapping)
# YAML 1.1 reads 1e-6 (no dot) as a string; every user writes learning rates like that.
_UniqueKeyLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


# PyYAML reads "\ud83d" as half a character, which can be printed and written nowhere.
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F][0-9a-fA-F]{2}")


def _parse(text: str, where: str) -> Any:
    if any("\ud800" <= letter <= "\udfff" for letter in text) or _SURROGATE.search(text):
        raise UserError(
            f"{where}: it holds half of a surrogate pair, which is no character; write the character itself"
        )
    try:
        return yaml.load(text, Loader=_UniqueKeyLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark is not None else ""
        raise UserError(f"{where}{line}: not valid YAML: {getattr(error, 'problem', None) or error}") from None
    except RecursionError:
        raise UserError(
            f"{where}: it is nested too deeply to be a configuration; sections are a few levels deep"
        ) from None
    except ValueError as error:  # a date or a number that YAML recognises and Python cannot hold
        raise UserError(f"{where}: not valid YAML: {first_line(error)}; put the value in quotes") from None


def _read(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    if not path.is_file():
        others = [p.name for p in path.parent.glob("*.yaml")]
        hint = nearest(path.name, others, where=f"{path.parent}/", list_known=False)
        raise UserError(f"no configuration file '{path}'{hint}")
    if path.resolve() in seen:
        raise UserError(f"'{path}' extends itself, by way of {' -> '.join(p.name for p in seen)}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"'{path}', line {line}: not UTF-8 ({error.reason}); save the file as UTF-8") from None
    values = _parse(text, str(path))
    if not isinstance(values, dict):
        raise UserError(f"'{path}' holds {type(values).__name__}, expected sections such as 'run:' and 'model:'")
    values = {key: value for key, value in values.items() if not str(key).startswith("x-")}  # places for anchors
    parent = values.pop("extends", None)
    if parent is None:
        return values
    if not isinstance(parent, str):
        raise UserError(f"'{path}': extends = {parent!r}: name one file, as in 'extends: base.yaml'")
    return _overlay(_read(path.parent / parent, (*seen, path.resolve())), values)


def _overlay(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in top.items():
        below = base.get(key)
        if isinstance(value, dict) and isinstance(below, dict) and not _renames(key, base, value):
            merged[key] = _overlay(below, value)
        else:
            merged[key] = value
    return merged


def _renames(key: str, base: dict[str, Any], value: dict[str, Any]) -> bool:
    """Whether it is another plugin: the options of the first one mean nothing to it. A run's name is not a plugin's."""
    if key == "run" or "name" not in value:
        return False
    before = base[key].get("name", _default_name(key, base))
    return before is not None and before != value["name"]


def _default_name(key: str, section: Mapping[str, Any]) -> str | None:
    """The plugin that options without a name belong to, in a section that holds them."""
    if key == "strategy":
        named: str = with_preset({"preset": section.get("preset"), key: {}}).get(key, {}).get("name", "low_confidence")
        return named
    return {"engine": "native", "rollouter": "single_turn"}.get(key)


def _apply(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise UserError(f"override '{override}': expected section.key=value, for example learner.lr=2e-6")
    node: Any = values
    above: dict[str, Any] = {}
    *parents, last = key.strip().split(".")
    for part in parents:
        if isinstance(node, list):
            node = node[_position(node, part, key)]
        elif isinstance(node, dict):
            if node.get(part) is None:
                node[part] = {}
            above, node = node, node[part]
        else:
            raise UserError(f"override '{key}': '{part}' is inside a plain value, not a section")
    value = _parse(text, f"override '{key}'")
    if isinstance(node, list):
        node[_position(node, last, key)] = value
    elif isinstance(node, dict):
        if last == "name" and node and parents and _renames(parents[-1], {**above, parents[-1]: node}, {"name": value}):
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
    if error["type"] in ("model_type", "model_attributes_type", "dict_type"):
        known = [name for name, field in getattr(_section_at(location), "model_fields", {}).items()]
        keys = f" with keys such as {', '.join(known[:4])}" if known else ""
        written = f"'{location[-1]}: {{{(known or ['key'])[0]}: ...}}'"
        return f"{key} = {_short(value)}: must be a section{keys}, written {written}"
    if error["type"] in ("list_type", "tuple_type") and isinstance(value, dict):
        return f"{key}: must be a list, it is a mapping; put '- ' before each entry, or write [{{...}}]"
    shown = f" = {_short(value)}" if not isinstance(value, dict | list | BaseModel) else ""
    return f"{key}{shown}: {message[0].lower()}{message[1:]}" if key else message


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _keys_at(location: Sequence[str]) -> list[str]:
    return list(getattr(_section_at(location), "model_fields", {}))


def _section_at(location: Sequence[str]) -> type[BaseModel] | None:
    """The section at a place of the configuration, if there is one."""
    model: type[BaseModel] | None = Config
    for part in location:
        if model is not None and not part.isdigit():
            field = model.model_fields.get(part)
            model = None if field is None else _model_in(field.annotation)
    return model


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((m for m in map(_model_in, typing.get_args(annotation)) if m is not None), None)
