"""4-bit layers under an adapter. Runs refuse them on a CPU, where they are slow; arithmetic can be tested there."""

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from safetensors.torch import load_file

from dllm_rl import registry
from dllm_rl.models.loading import load_denoiser, save_denoiser
from dllm_rl.models.lora import add_lora, load_adapter, merged_weights, reference_weights, save_adapter
from dllm_rl.models.quantize import quantize, whole

CPU = torch.device("cpu")
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
}  # bitsandbytes unpacks rows that are no multiple of 64 wrongly here


def in_4_bits(make, family):
    denoiser = make(family, **SIZES)
    assert quantize(denoiser, CPU) == 7 * 2
    for layer in denoiser.module.modules():
        if isinstance(layer, Linear4bit):  # some processors would repack weights for inference, for good
            layer.support_avx512bf16_for_cpu = False
    return denoiser


@pytest.mark.parametrize("family", registry.names("families"))
def test_layers_compute_with_their_unpacked_weights(make, family, hidden_of):
    exact, small = make(family, **SIZES), in_4_bits(make, family)
    packed = 0
    plain = dict(exact.module.named_parameters())
    for name, parameter in small.module.named_parameters():
        value, original = whole(parameter), plain[name].detach()
        assert value.shape == original.shape and value.dtype == original.dtype
        if value.data_ptr() == parameter.data_ptr():
            assert torch.equal(value, original), f"{name} is not to be quantised"
            continue
        packed += parameter.numel() * parameter.element_size()
        blocks, off = original.reshape(-1, 64), (value - original).reshape(-1, 64)
        # The widest gap between two levels of NF4 is 0.304 of a block's largest number; half of it, plus the scale's
        # own rounding.
        assert bool((off.abs().amax(1) <= 0.17 * blocks.abs().amax(1)).all()), name
        assert float(off.pow(2).mean() / original.pow(2).mean()) < 0.011
    assert packed == sum(p.numel() for n, p in plain.items() if "layers" in n and "proj.weight" in n) // 2
    with torch.no_grad():
        for name, parameter in small.module.named_parameters():
            plain[name].copy_(whole(parameter))
    assert torch.allclose(hidden_of(small), hidden_of(exact), atol=1e-4)


@pytest.mark.parametrize("family", registry.names("families"))
def test_an_adapter_trains_above_them_and_is_saved(make, tokenizer, tmp_path, family, hidden_of, train_a_little):
    denoiser = in_4_bits(make, family)
    base = hidden_of(denoiser)
    add_lora(denoiser, rank=3, alpha=6, seed=0)
    assert sum(isinstance(m, Linear4bit) for m in denoiser.module.modules()) == 7 * 2
    assert torch.equal(hidden_of(denoiser), base)
    trained = [name for name, p in denoiser.module.named_parameters() if p.requires_grad]
    assert trained and all(".lora_" in name for name in trained)
    train_a_little(denoiser)
    adapted = hidden_of(denoiser)
    assert not torch.allclose(adapted, base, atol=1e-2)
    with reference_weights(denoiser):
        assert torch.equal(hidden_of(denoiser), base)
    save_adapter(denoiser, tmp_path / "adapter")
    again = in_4_bits(make, family)
    load_adapter(again, tmp_path / "adapter")
    assert torch.equal(hidden_of(again), adapted)
    save_denoiser(denoiser, tokenizer, tmp_path / "merged")
    merged = dict(merged_weights(denoiser))
    stored = load_file(next((tmp_path / "merged").glob("*.safetensors")))
    assert all(value.dtype == torch.float32 for value in stored.values())
    loaded, _ = load_denoiser(tmp_path / "merged", family=family)
    assert all(torch.equal(p, merged[n]) for n, p in loaded.module.named_parameters())
    assert torch.allclose(hidden_of(loaded), adapted, atol=1e-4)


def test_gradients_are_those_of_unpacked_weights(make, train_a_little):
    small, exact = in_4_bits(make, "llada"), make("llada", **SIZES)
    with torch.no_grad():
        for (_, packed), (_, plain) in zip(
            small.module.named_parameters(), exact.module.named_parameters(), strict=True
        ):
            plain.copy_(whole(packed))
    tokens = torch.randint(3, exact.vocab_size, (2, 8))
    found = []
    for denoiser in (small, exact):
        add_lora(denoiser, rank=3, alpha=6, seed=0)
        train_a_little(denoiser)
        states = denoiser.hidden_states(tokens, torch.arange(8).expand(2, 8) > 3, torch.ones(2, 8, dtype=torch.bool))
        denoiser.unembed(states.flatten(0, 1)).log_softmax(-1)[:, 5].sum().backward()
        found.append({n: p.grad for n, p in denoiser.module.named_parameters() if p.requires_grad})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        assert torch.allclose(gradient, found[1][name], rtol=1e-3, atol=1e-4), name


def test_a_dtype_without_kernels_is_refused(make):
    with pytest.raises(ValueError, match=r"cannot compute in torch\.float64; set model\.dtype: bfloat16"):
        quantize(make("tiny", dtype=torch.float64), CPU)


@pytest.mark.gpu
def test_on_a_device(make):
    small = make("llada", hidden_size=128, intermediate_size=256)
    exact = make("llada", hidden_size=128, intermediate_size=256)
    quantize(small, torch.device("cuda"))
    add_lora(small, rank=3, alpha=6, seed=0)
    with torch.no_grad():
        for name, parameter in exact.module.named_parameters():
            mine = dict(merged_weights(small))[name]
            parameter.copy_(mine)
    exact.module.to("cuda")
    tokens = torch.randint(3, exact.vocab_size, (2, 8), device="cuda")
    mask, valid = torch.arange(8, device="cuda").expand(2, 8) > 3, torch.ones(2, 8, dtype=torch.bool, device="cuda")
    with torch.no_grad():
        assert torch.allclose(
            small.hidden_states(tokens, mask, valid), exact.hidden_states(tokens, mask, valid), atol=1e-2
        )
