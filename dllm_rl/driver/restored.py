"""Dataclasses from the plain values that asdict makes of them: what torch.load reads without running code."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Sequence
from typing import Any


def restored(kind: Any, value: Any) -> Any:
    """A value of a type, by the types of its fields; fields that are not there get their default.

    Raises:
        KeyError: a field that the dataclass does not have.
        TypeError: one without a default is missing.
    """
    if dataclasses.is_dataclass(kind):
        types = typing.get_type_hints(kind)
        return typing.cast(Any, kind)(**{name: restored(types[name], entry) for name, entry in value.items()})
    if typing.get_origin(kind) in (list, Sequence):
        return [restored(typing.get_args(kind)[0], entry) for entry in value]
    return value
