"""What sections of a configuration are made of."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict

PathText = Annotated[str, AfterValidator(lambda text: os.path.expanduser(os.path.expandvars(text)))]
"""A path: "~" and environment variables are filled in."""


class Section(BaseModel):
    """Base of every section: unknown keys are errors, values are immutable, docstrings under fields are their help."""

    # Infinity and NaN pass every "greater than" and end as a loss that is not finite, hours later.
    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=(), allow_inf_nan=False
    )


class Plugin(BaseModel):
    """A plugin by entry-point name or "package.module:Name"; further keys are its options."""

    model_config = ConfigDict(extra="allow", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    name: str
    """Entry-point name, or "package.module:Name"."""

    @property
    def options(self) -> dict[str, Any]:
        """The keys beside ``name``."""
        return dict(self.model_extra or {})


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as "section.key": value."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        found |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found
