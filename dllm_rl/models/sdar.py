"""SDAR and TraDo: Qwen3 names and equations, block-causal attention.

Source: Cheng et al. 2025, arXiv:2510.06303; Wang et al. 2025, arXiv:2509.06949; published modeling_sdar.py, and
generate.py, whose blocks are counted from the first token of the prompt.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import Qwen3ForCausalLM

from dllm_rl.models.family import LINEAR_LAYERS, Family, hugging_face_options, require


def to_transformers(config: Mapping[str, Any]) -> dict[str, Any]:
    """Qwen3 configuration of an SDAR config.json."""
    require(config, "sdar", {"use_sliding_window": (False, False), "num_experts": (None, None)})
    return {
        **hugging_face_options(config, "sdar"),
        "head_dim": config.get("head_dim", 128),
        "attention_bias": config.get("attention_bias", False),
    }


def new_config(shared: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of a new SDAR-shaped model."""
    return {
        "architectures": ["SDARForCausalLM"],
        "model_type": "sdar",
        "head_dim": shared["hidden_size"] // shared["num_attention_heads"],
        "attention_bias": False,
        "use_sliding_window": False,
        "sliding_window": None,
        "max_window_layers": shared["num_hidden_layers"],
        **shared,
    }


SDAR = Family(
    name="sdar",
    model_type="sdar",
    architectures=("SDARForCausalLM",),
    absent_keys=("num_experts",),
    module_class=Qwen3ForCausalLM,
    to_transformers=to_transformers,
    new_config=new_config,
    lora_targets=LINEAR_LAYERS,
    mask_token="<|MASK|>",
    block_causal=True,
    block_origin="sequence",
)
