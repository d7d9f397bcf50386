"""Logits in float32 from a network of low precision."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dllm_rl.models.unembedding import Float32Logits


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
def test_logits_are_those_of_the_exact_product(dtype, bias):
    torch.manual_seed(0)
    layer, rows = Float32Logits(64, 50, bias=bias).to(dtype), (8 * torch.randn(2, 3, 64)).to(dtype)
    exact = nn.functional.linear(rows.double(), layer.weight.double(), layer.bias.double() if bias else None)
    got = layer(rows)
    assert got.dtype == torch.float32 and got.shape == (2, 3, 50)
    torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-5)
    rounded = nn.functional.linear(rows, layer.weight, layer.bias)
    assert (rounded.double() - exact).abs().max() > 1e-3, "or the layer would not be needed"


def test_gradients_are_those_of_the_exact_product_but_for_rounding():
    torch.manual_seed(0)
    layer, rows = Float32Logits(64, 50, bias=False).bfloat16(), torch.randn(7, 64).bfloat16().requires_grad_()
    exact = [layer.weight.detach().double().requires_grad_(), rows.detach().double().requires_grad_()]
    slope = torch.randn(7, 50)
    got = torch.autograd.grad((layer(rows) * slope).sum(), [layer.weight, rows])
    want = torch.autograd.grad(((exact[1] @ exact[0].t()) * slope).sum(), exact)
    for mine, theirs in zip(got, want, strict=True):
        assert mine.dtype == torch.bfloat16
        assert (mine.double() - theirs).norm() < 0.01 * theirs.norm()


@pytest.mark.parametrize("family", ["tiny", "llada", "dream", "sdar"])
def test_every_family_unembeds_in_float32(tiny_denoiser, family):
    denoiser = tiny_denoiser(family)
    states = torch.randn(4, 32)
    plain = nn.functional.linear(states, denoiser.module.get_output_embeddings().weight)
    assert torch.equal(denoiser.unembed(states), plain), "in float32 it is a linear layer"
    denoiser.module.bfloat16()
    assert denoiser.unembed(states.bfloat16()).dtype == torch.float32
