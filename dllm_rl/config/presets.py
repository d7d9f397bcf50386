"""Decoding settings of released generators by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_PRESETS: Mapping[str, Mapping[str, Any]] = {
    # generate() of ML-GSAI/LLaDA: its default arguments, steps = gen_length
    "llada": {
        "schedule": "uniform",
        "temperature": 0.0,
        "strategy": {"name": "low_confidence"},
    },
    # diffusion_generate() as Dream's README calls it; top_k = 50 is what transformers adds to the model's configuration
    "dream": {
        "schedule": "timesteps",
        "temperature": 0.2,
        "top_k": 50,
        "top_p": 0.95,
        "top_p_first": True,
        "confidence": "sampled",
        "strategy": {"name": "entropy"},
    },
    # block_diffusion_generate() of JetAstra/SDAR: the default arguments of its command line, steps = gen_length
    "sdar": {
        "schedule": "static",
        "temperature": 1.0,
        "confidence": "sampled",
        "strategy": {"name": "confidence_threshold", "threshold": 0.85, "at_least_count": True},
    },
    # llada/generate.py of NVlabs/Fast-dLLM as its evaluation scripts call it
    "fast_dllm": {
        "block_size": 32,
        "temperature": 0.0,
        "strategy": {"name": "confidence_threshold", "threshold": 0.9},
    },
}


def with_preset(sampling: Mapping[str, Any]) -> Mapping[str, Any]:
    """A sampling section with the settings of its preset under its own.

    Args:
        sampling: plain values; options of the preset's own strategy may stand without its name.
    """
    preset = _PRESETS.get(str(sampling.get("preset")))
    if preset is None:  # none, or an unknown one, which the schema refuses
        return sampling
    strategy, below = sampling.get("strategy"), preset["strategy"]
    if not isinstance(strategy, Mapping):
        return {**preset, **sampling}
    same = strategy.get("name", below["name"]) == below["name"]
    return {**preset, **sampling, "strategy": {**below, **strategy} if same else strategy}
