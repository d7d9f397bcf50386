"""Dream and DiffuCoder: Qwen2 names and equations, full attention, output position i predicts token i + 1.

Source: Ye et al. 2025, arXiv:2508.15487; Gong et al. 2025, arXiv:2506.20639; published modeling_dream.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import Qwen2ForCausalLM

from dllm_rl.models.family import LINEAR_LAYERS, Family, hugging_face_options, require


def to_transformers(config: Mapping[str, Any]) -> dict[str, Any]:
    """Qwen2 configuration of a Dream config.json."""
    fixed = {"use_sliding_window": (False, False), "use_mrope": (False, False)}
    require(config, "dream", {**fixed, "block_size": (None, None), "num_experts": (None, None)})
    return hugging_face_options(config, "dream")


def new_config(shared: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of a new Dream-shaped model."""
    return {
        "architectures": ["DreamModel"],
        "model_type": "Dream",
        "use_sliding_window": False,
        "sliding_window": None,
        "max_window_layers": shared["num_hidden_layers"],
        **shared,
    }


DREAM = Family(
    name="dream",
    model_type="Dream",
    architectures=("DreamModel",),
    absent_keys=("block_size", "head_dim"),  # DreamReasoner: Qwen3 equations, block-causal, no shift
    module_class=Qwen2ForCausalLM,
    to_transformers=to_transformers,
    new_config=new_config,
    lora_targets=LINEAR_LAYERS,
    mask_token="<|mask|>",
    shift=True,
    tokenizer_substitutes={"DreamTokenizer": "Qwen2Tokenizer"},
)
