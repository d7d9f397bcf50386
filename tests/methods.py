"""How each method is configured in small runs, read from configs/methods, so that a new one needs no line here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dllm_rl.config.load import load_config
from dllm_rl.config.schema import Config

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "methods"
# For models of a few hundred updates: as small, and as easily sure.
STRATEGIES: dict[str, dict[str, Any]] = {"confidence_threshold": {"threshold": 0.2}, "learned": {"width": 16}}


def tiny(name: str) -> Config:
    """The tiny configuration of a method."""
    return load_config(CONFIGS / f"{name}_tiny.yaml")


def sections(name: str) -> dict[str, dict[str, Any]]:
    """What it says of the algorithm and of its sampling."""
    config = tiny(name)
    algorithm, strategy = config.algorithm, config.sampling.strategy
    return {
        "algorithm": {"name": name} | algorithm.options,
        "sampling": {
            "strategy": {"name": strategy.name} | strategy.options | STRATEGIES.get(strategy.name, {}),
            "temperature": config.sampling.temperature,
            "tokens_per_step": config.sampling.tokens_per_step,
        },
    }


def paces_itself(name: str) -> bool:
    """Whether its strategy decides how many tokens a forward commits, so that speed is what it learns."""
    return tiny(name).evaluate.tokens_per_step == [1]
