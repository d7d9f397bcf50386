"""How each method is configured in small runs, read from configs/methods, so that a new one needs no line here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dllm_rl.config.load import load_config
from dllm_rl.config.schema import Config

UNTAUGHT = {"retain": 0.25}  # for want of the teacher that a configuration names: itself, with later tokens in sight
CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "methods"


def tiny(name: str) -> Config:
    """The tiny configuration of a method."""
    return load_config(CONFIGS / f"{name}_tiny.yaml")


def sections(name: str, *, threshold: float = 0.2) -> dict[str, dict[str, Any]]:
    """What it says of the algorithm and of its sampling, with a threshold for models that are sure of little."""
    config, changed = tiny(name), {"confidence_threshold": {"threshold": threshold}}
    algorithm, strategy = config.algorithm, config.sampling.strategy
    return {
        "algorithm": {"name": name} | algorithm.options | (UNTAUGHT if config.model.teacher else {}),
        "sampling": {
            "strategy": {"name": strategy.name} | strategy.options | changed.get(strategy.name, {}),
            "temperature": config.sampling.temperature,
            "tokens_per_step": config.sampling.tokens_per_step,
        },
    }


def paces_itself(name: str) -> bool:
    """Whether its strategy decides how many tokens a forward commits, so that speed is what it learns."""
    return tiny(name).evaluate.tokens_per_step == [1]
