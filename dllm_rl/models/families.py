"""The families that can be loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dllm_rl.errors import UserError, nearest
from dllm_rl.models.dream import DREAM
from dllm_rl.models.family import Family
from dllm_rl.models.llada import LLADA
from dllm_rl.models.sdar import SDAR
from dllm_rl.models.tiny import TINY

FAMILIES: Mapping[str, Family] = {family.name: family for family in (LLADA, DREAM, SDAR, TINY)}


def family_named(name: str) -> Family:
    """The family with this name.

    Raises:
        UserError: unknown name.
    """
    if name not in FAMILIES:
        raise UserError(f"unknown model family '{name}'{nearest(name, FAMILIES)}")
    return FAMILIES[name]


def family_of(config: Mapping[str, Any], where: str) -> Family:
    """The family that a config.json belongs to, by its model_type.

    Raises:
        UserError: a model_type that no family has.
    """
    model_type = config.get("model_type")
    for family in FAMILIES.values():
        if family.model_type == model_type:
            return family
    known = ", ".join(f"{family.model_type!r} ({family.name})" for family in FAMILIES.values())
    raise UserError(f"{where}: unknown model family, model_type = {model_type!r} in config.json; known: {known}")
