"""Which family a checkpoint is of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dllm_rl import registry
from dllm_rl.errors import UserError
from dllm_rl.models.family import Family


def family_named(name: str) -> Family:
    """The family with this entry-point name or at this "package.module:Name".

    Raises:
        UserError: unknown name, or something else than a Family.
    """
    found = registry.load("families", name)
    if not isinstance(found, Family):
        raise UserError(f"model family '{name}' is a {type(found).__name__}, expected a dllm_rl.models.family.Family")
    return found


def family_of(config: Mapping[str, Any], where: str) -> Family:
    """The one registered family that a config.json matches.

    Raises:
        UserError: none matches, or several do.
    """
    families = {name: family_named(name) for name in registry.names("families")}
    matching = []
    for name, family in families.items():
        with registry.plugin_boundary("families", name, "matches()", type(family).__module__):
            matching += [name] if family.matches(config) else []
    if len(matching) == 1:
        return families[matching[0]]
    says = f"model_type = {config.get('model_type')!r}, architectures = {config.get('architectures')!r} in config.json"
    if matching:
        raise UserError(f"{where}: several model families match {says}: {', '.join(matching)}; set model.family to one")
    known = "; ".join(f"{name} ({_signature(family)})" for name, family in families.items())
    raise UserError(
        f"{where}: unknown model family, {says}; set model.family if one of them computes the same, or to your own "
        f"'package.module:Name'; known: {known}"
    )


def _signature(family: Family) -> str:
    required = [f"with {key}" for key in family.required_keys]
    return " ".join(
        (family.model_type, *family.architectures, *required, *(f"without {key}" for key in family.absent_keys))
    )
