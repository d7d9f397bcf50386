"""Our own small models, trained from scratch: plain Llama names and keys, full attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import LlamaForCausalLM

from dllm_rl.models.family import LINEAR_LAYERS, Family, hugging_face_options


def to_transformers(config: Mapping[str, Any]) -> dict[str, Any]:
    """Llama configuration of our config.json."""
    return hugging_face_options(config, "tiny")


def new_config(shared: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of a new model."""
    return {"model_type": "dllm_rl_tiny", **shared}


TINY = Family(
    name="tiny",
    model_type="dllm_rl_tiny",
    module_class=LlamaForCausalLM,
    to_transformers=to_transformers,
    new_config=new_config,
    lora_targets=LINEAR_LAYERS,
    mask_token="<mask>",
)
