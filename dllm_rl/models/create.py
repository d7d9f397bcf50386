"""New models of any family, with random weights."""

from __future__ import annotations

from typing import Any

import torch

from dllm_rl.errors import UserError
from dllm_rl.models.denoiser import TransformersDenoiser
from dllm_rl.models.families import family_named
from dllm_rl.models.family import Family, finish
from dllm_rl.seeding import generator_for
from dllm_rl.types import BlockOrigin

INIT_STD = 0.02


def create_denoiser(
    family: str,
    tokenizer: Any,
    *,
    hidden_size: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int | None = None,
    intermediate_size: int | None = None,
    max_length: int,
    block_size: int | None = None,
    block_origin: BlockOrigin | None = None,
    tie_embeddings: bool = False,
    rope_theta: float = 10000.0,
    norm_eps: float = 1e-6,
    seed: int,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> TransformersDenoiser:
    """A model with weights drawn from N(0, 0.02^2); norms 1, biases 0.

    The weights depend on seed and shape alone: no global generator is read or moved.

    Args:
        family: its entry point, or "package.module:Name".
        tokenizer: gives the vocabulary size and the mask, eos and pad tokens.
        hidden_size: width D; divisible by 2 * num_heads.
        num_layers: layers.
        num_heads: query heads.
        num_kv_heads: key and value heads, default num_heads.
        intermediate_size: feed-forward width, default 4 * hidden_size.
        max_length: longest sequence, tokens.
        block_size: tokens per block (block-causal families only).
        block_origin: where blocks start; None takes the family's.
        tie_embeddings: share the input and output embedding matrix.
        rope_theta: base of the rotary frequencies.
        norm_eps: epsilon of the norms.
        seed: seed of the weights.
        dtype: parameter type.
        device: where the parameters live.
    Raises:
        UserError: sizes that do not divide, or a tokenizer without mask or eos token.
    """
    chosen = family_named(family)
    block_origin = block_origin or chosen.block_origin
    num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    if hidden_size % (2 * num_heads):
        raise UserError(
            f"hidden_size = {hidden_size}: must be a multiple of 2 * num_heads = {2 * num_heads} (rotary pairs)"
        )
    if num_heads % num_kv_heads:
        raise UserError(f"num_kv_heads = {num_kv_heads}: must divide num_heads = {num_heads}")
    for name in ("mask_token", "eos_token"):
        if getattr(tokenizer, f"{name}_id") is None:
            raise UserError(f"the tokenizer has no {name}; add one with tokenizer.add_special_tokens")
    pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    config = chosen.declared(
        "new_config",
        {
            "vocab_size": len(tokenizer),
            "hidden_size": hidden_size,
            "intermediate_size": 4 * hidden_size if intermediate_size is None else intermediate_size,
            "num_hidden_layers": num_layers,
            "num_attention_heads": num_heads,
            "num_key_value_heads": num_kv_heads,
            "max_position_embeddings": max_length,
            "tie_word_embeddings": tie_embeddings,
            "rope_theta": rope_theta,
            "rope_scaling": None,
            "rms_norm_eps": norm_eps,
            "hidden_act": "silu",
            "attention_dropout": 0.0,
            "initializer_range": INIT_STD,
            "use_cache": False,
            "mask_token_id": tokenizer.mask_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": pad_id,
        },
    )
    if chosen.block_causal:
        config |= {"block_size": block_size, "block_origin": block_origin}
    module = chosen.skeleton(config, dtype).to_empty(device=device)
    _initialise(module, chosen, seed)
    finish(module, device)
    return TransformersDenoiser(
        module,
        chosen,
        config,
        mask_id=tokenizer.mask_token_id,
        eos_id=tokenizer.eos_token_id,
        pad_id=pad_id,
        block_size=block_size,
        block_origin=block_origin,
        source=f"new {family}",
    )


@torch.no_grad()
def _initialise(module: torch.nn.Module, family: Family, seed: int) -> None:
    for name, parameter in module.named_parameters():
        if name.endswith("bias"):
            parameter.zero_()
        elif parameter.dim() == 1:  # of a norm
            parameter.fill_(1.0)
        else:
            generator = generator_for(seed, "weights", family.to_original_name(name))
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * INIT_STD)
