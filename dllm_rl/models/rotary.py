"""Rotary embeddings applied in float32 whatever the network's dtype, as LLaDA's published code does.

transformers rotates in the dtype of the network, which in bfloat16 rounds angles of long sequences visibly. Here cosine
and sine stay in float32, so that the rotation promotes queries and keys, and attention casts them back afterwards.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

FLOAT32_ROTARY = "sdpa_float32_rotary"


class Float32Rotary(LlamaRotaryEmbedding):  # transformers is untyped here
    """Cosine and sine (N, L, head width) in float32."""

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """See LlamaRotaryEmbedding; only device and dtype of x matter there."""
        cos_sin: tuple[Tensor, Tensor] = super().forward(x.new_empty(0, dtype=torch.float32), position_ids)
        return cos_sin


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    output: tuple[Tensor, None] = sdpa_attention_forward(
        module, query.to(value.dtype), key.to(value.dtype), value, attention_mask, **options
    )
    return output


AttentionInterface.register(FLOAT32_ROTARY, _attend)
