"""Nested dataclasses of tensors to and from plain values: what torch.load reads without running code."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping, Sequence
from typing import Any


def to_plain(value: Any) -> Any:
    """Dataclasses and mappings as dicts, sequences as lists; tensors are not copied (dataclasses.asdict does)."""
    if dataclasses.is_dataclass(value):
        return {field.name: to_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {name: to_plain(entry) for name, entry in value.items()}
    return [to_plain(entry) for entry in value] if isinstance(value, list | tuple) else value


def from_plain(kind: Any, value: Any) -> Any:
    """The opposite, by the types of the fields; fields that are not there get their default.

    Raises:
        KeyError: a field that the dataclass does not have.
        TypeError: one without a default is missing.
    """
    if dataclasses.is_dataclass(kind):
        types = typing.get_type_hints(kind)
        return typing.cast(Any, kind)(**{name: from_plain(types[name], entry) for name, entry in value.items()})
    origin = typing.get_origin(kind)
    if origin in (list, tuple, Sequence):
        made = [from_plain(typing.get_args(kind)[0], entry) for entry in value]
        return tuple(made) if origin is tuple else made
    return value
