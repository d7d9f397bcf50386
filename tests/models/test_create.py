import pytest
import torch
from transformers import PreTrainedTokenizerFast

from dllm_rl import registry
from dllm_rl.models.create import INIT_STD, create_denoiser

SIZES = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_length": 32}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", registry.names("families"))
def test_weights_are_a_function_of_the_seed(tokenizer, family, tied):
    options = SIZES | {"tie_embeddings": tied, "block_size": 4 if family == "sdar" else None}
    before = torch.get_rng_state()
    first, again = (create_denoiser(family, tokenizer, seed=1, **options).module.state_dict() for _ in range(2))
    other = create_denoiser(family, tokenizer, seed=2, **options).module.state_dict()
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(first[name], again[name]) for name in first)
    for name, value in first.items():
        if name.endswith("norm.weight"):
            assert (value == 1).all()
        elif name.endswith("bias"):
            assert (value == 0).all()
        else:
            assert not torch.equal(value, other[name])
            assert abs(float(value.std()) / INIT_STD - 1) < 0.2
    assert (first["lm_head.weight"].data_ptr() == first["model.embed_tokens.weight"].data_ptr()) == tied


def test_layers_differ_from_one_another(tokenizer):
    weights = create_denoiser("tiny", tokenizer, seed=1, **SIZES).module.state_dict()
    assert not torch.equal(weights["model.layers.0.mlp.up_proj.weight"], weights["model.layers.1.mlp.up_proj.weight"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_size": 36}, "multiple of 2 . num_heads = 8"),
        ({"num_kv_heads": 3}, "must divide num_heads = 4"),
        ({"block_size": 4}, "full attention"),
    ],
)
def test_sizes_are_checked(tokenizer, options, message):
    with pytest.raises(ValueError, match=message):
        create_denoiser("tiny", tokenizer, seed=1, **(SIZES | options))


def test_a_tokenizer_without_mask_token_is_refused(tokenizer):
    maskless = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<eos>")
    with pytest.raises(ValueError, match="no mask_token"):
        create_denoiser("tiny", maskless, seed=1, **SIZES)
