"""LLaDA (8B-Base, 8B-Instruct, 1.5): Llama with other names and full attention.

Source: Nie et al. 2025, arXiv:2502.09992; published modeling_llada.py (block_type "llama", RMS norms, SwiGLU written as
ff_proj = gate, up_proj = up, ff_out = down, rotary embeddings in the half-split layout).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import LlamaForCausalLM

from dllm_rl.models.family import Family, pick, require, rope
from dllm_rl.models.rotary import FLOAT32_ROTARY

_LAYER = "model.transformer.blocks.{i}"
_TARGETS = {
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "attn_out": "self_attn.o_proj",
    "ff_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "ff_out": "mlp.down_proj",
}
_NORMS = {"attn_norm": "input_layernorm", "ff_norm": "post_attention_layernorm"}

# option -> (what the published configuration class assumes when absent, what LlamaForCausalLM computes)
_FIXED = {
    "block_type": ("sequential", "llama"),
    "activation_type": ("swiglu", "silu"),
    "layer_norm_type": ("default", "rms"),
    "layer_norm_with_affine": (True, True),
    "rope": (False, True),
    "alibi": (False, False),
    "attention_layer_norm": (False, False),
    "include_bias": (False, False),
    "include_qkv_bias": (False, False),
    "bias_for_layer_norm": (False, False),
    "input_emb_norm": (False, False),
    "scale_logits": (False, False),
    "block_group_size": (1, 1),
}


def to_transformers(config: Mapping[str, Any]) -> dict[str, Any]:
    """Llama configuration of a LLaDA config.json."""
    require(config, "llada", {"num_experts": (None, None), **_FIXED})
    size = pick(config, "llada", ("d_model", "n_heads", "n_layers", "vocab_size", "max_sequence_length"))
    kv_heads = config.get("n_kv_heads") or (1 if config.get("multi_query_attention") else size["n_heads"])
    return {
        "vocab_size": config.get("embedding_size") or size["vocab_size"],
        "hidden_size": size["d_model"],
        "intermediate_size": config.get("mlp_hidden_size") or config.get("mlp_ratio", 4) * size["d_model"],
        "num_hidden_layers": size["n_layers"],
        "num_attention_heads": size["n_heads"],
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": size["max_sequence_length"],
        "tie_word_embeddings": config.get("weight_tying", True),
        "rope_parameters": rope(config),
        "rms_norm_eps": config.get("rms_norm_eps", 1e-5),
        "attn_implementation": FLOAT32_ROTARY if config.get("rope_full_precision", True) else "sdpa",
    }


def new_config(shared: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of a new LLaDA-shaped model."""
    return {
        "architectures": ["LLaDAModelLM"],
        "model_type": "llada",
        "d_model": shared["hidden_size"],
        "n_heads": shared["num_attention_heads"],
        "n_kv_heads": shared["num_key_value_heads"],
        "n_layers": shared["num_hidden_layers"],
        "mlp_hidden_size": shared["intermediate_size"],
        "mlp_ratio": 4,
        "vocab_size": shared["vocab_size"],
        "embedding_size": shared["vocab_size"],
        "max_sequence_length": shared["max_position_embeddings"],
        "weight_tying": shared["tie_word_embeddings"],
        "rope_theta": shared["rope_theta"],
        "rope_full_precision": True,
        "rms_norm_eps": shared["rms_norm_eps"],
        "attention_dropout": 0.0,
        "residual_dropout": 0.0,
        "embedding_dropout": 0.0,
        "flash_attention": False,
        "multi_query_attention": None,
        "init_device": "cpu",
        "init_std": 0.02,
        "use_cache": False,
        "mask_token_id": shared["mask_token_id"],
        "eos_token_id": shared["eos_token_id"],
        "pad_token_id": shared["pad_token_id"],
        **{key: wanted for key, (_, wanted) in _FIXED.items()},
    }


LLADA = Family(
    name="llada",
    model_type="llada",
    architectures=("LLaDAModelLM",),
    required_keys=("d_model",),  # the language model of LLaDA-V has Llama's keys
    absent_keys=("num_experts",),  # LLaDA-MoE
    module_class=LlamaForCausalLM,
    to_transformers=to_transformers,
    new_config=new_config,
    max_length_key="max_sequence_length",
    lora_targets=_TARGETS,
    names=(
        *((f"{_LAYER}.{ours}", f"model.layers.{{i}}.{theirs}") for ours, theirs in {**_TARGETS, **_NORMS}.items()),
        ("model.transformer.wte", "model.embed_tokens"),
        ("model.transformer.ln_f", "model.norm"),
        ("model.transformer.ff_out", "lm_head"),
    ),
    mask_token="<|mdm_mask|>",
)
