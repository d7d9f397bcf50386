import pytest
import torch
import torch.nn.functional as F

from dllm_rl.seeding import generator_for


def rotated(x, angle):
    low, high = x.chunk(2, dim=-1)
    return torch.cat(
        [low * angle.cos() - high * angle.sin(), high * angle.cos() + low * angle.sin()],
        dim=-1,
    )


@pytest.mark.parametrize("family", ["llada", "dream", "sdar", "tiny"])
def test_llada_rotates_in_float32_in_a_bfloat16_network_as_published_and_the_others_do_not(make, family):
    network = make(family, dtype=torch.bfloat16, num_kv_heads=4).module.model
    cos, sin = network.rotary_emb(torch.zeros(1, 9, 24, dtype=torch.bfloat16), torch.arange(9)[None])
    assert cos.dtype == sin.dtype == (torch.float32 if family == "llada" else torch.bfloat16)


def test_llada_attention_in_bfloat16_is_the_published_computation_to_the_bit(make):
    network = make("llada", dtype=torch.bfloat16).module.model
    layer = network.layers[0].self_attn
    x = torch.randn(1, 9, 24, generator=generator_for(1)).bfloat16()
    seen = torch.ones(1, 1, 9, 9, dtype=torch.bool)
    embeddings = network.rotary_emb(x, torch.arange(9)[None])
    ours, _ = layer(x, position_embeddings=embeddings, attention_mask=seen)

    frequency = 1.0 / (1234.5 ** (torch.arange(0, 6, 2, dtype=torch.float32) / 6))
    angle = torch.arange(9).float()[:, None] * frequency
    q, k, v = (
        (x @ getattr(layer, f"{name}_proj").weight.T).view(1, 9, -1, 6).transpose(1, 2) for name in ("q", "k", "v")
    )
    q, k = (rotated(y.float(), angle).bfloat16() for y in (q, k))
    k, v = (y.repeat_interleave(2, dim=1) for y in (k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2).reshape(1, 9, 24)
    assert torch.equal(ours, out @ layer.o_proj.weight.T)
