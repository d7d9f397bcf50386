"""Random tiny checkpoints of every family, with weights that make every term of the equations count."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dllm_rl.models.create import create_denoiser
from dllm_rl.models.denoiser import TransformersDenoiser
from dllm_rl.models.loading import save_denoiser
from dllm_rl.models.tokenizers import character_tokenizer
from dllm_rl.seeding import generator_for

CHARACTERS = "0123456789abcdefgh+-= \n"


@pytest.fixture(scope="session")
def tokenizer():
    return character_tokenizer(CHARACTERS)


@pytest.fixture
def make(tokenizer) -> Callable[..., TransformersDenoiser]:
    """make(family, **options) -> denoiser with random norms, biases and matrices."""

    def build(family: str, **options) -> TransformersDenoiser:
        defaults = {
            "hidden_size": 24,
            "num_layers": 2,
            "num_heads": 4,
            "num_kv_heads": 2,
            "intermediate_size": 40,
            "max_length": 64,
            "rope_theta": 1234.5,
            "norm_eps": 1e-3,
            "seed": 3,
        }
        if family == "sdar":
            defaults["block_size"] = 4
        denoiser = create_denoiser(family, tokenizer, **(defaults | options))
        with torch.no_grad():
            for name, parameter in denoiser.module.named_parameters():
                draw = torch.randn(parameter.shape, generator=generator_for(11, name), dtype=torch.float64)
                scale, shift = (0.3, 1.0) if name.endswith("norm.weight") else (0.3, 0.0)
                parameter.copy_(shift + scale * draw)
        return denoiser

    return build


@pytest.fixture
def saved(make, tokenizer, tmp_path) -> Callable[..., Path]:
    """saved(family, **options) -> folder of a checkpoint in the family's own layout."""

    def build(family: str, **options) -> Path:
        folder = tmp_path / f"{family}-{len(list(tmp_path.iterdir()))}"
        save_denoiser(make(family, **options), tokenizer, folder)
        return folder

    return build
