"""Measurements behind the claims that are not training runs, once per seed. See claims.py."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import claim_estimators
import claim_frontier

from dllm_rl.cli.output import write_json

MEASURES: Mapping[str, Callable[[Path, int], Any]] = {
    "complementary": claim_estimators.complementary,
    "quadrature": claim_estimators.quadrature,
    "preference score": claim_estimators.preference_score,
    "start": claim_frontier.start,
    "frontier": claim_frontier.frontier,
}


def measure(output: Path, name: str, seed: int) -> Any:
    """A measurement of a seed, from its file if it was made before."""

    def with_numbers_as_keys(mapping: dict[str, Any]) -> dict[Any, Any]:
        return {int(key) if key.isdigit() else key: value for key, value in mapping.items()}

    file = output / f"base-seed{seed}" / f"{name.replace(' ', '-')}.json"
    if not file.exists():
        write_json(file, MEASURES[name](output, seed))
    return json.loads(file.read_text(encoding="utf-8"), object_hook=with_numbers_as_keys)
