"""Random tiny checkpoints of every family, with weights that make every term of the equations count."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dllm_rl.diffusion.layout import block_index
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


@pytest.fixture
def hidden_of() -> Callable[[TransformersDenoiser], Tensor]:
    """hidden_of(denoiser) -> its states of a fixed batch."""

    def run(denoiser):
        tokens = torch.randint(3, denoiser.vocab_size, (2, 8), generator=generator_for(7))
        mask = torch.arange(8).expand(2, 8) > 3
        blocks = block_index(torch.tensor([4, 4]), 8, 4) if denoiser.block_size else None
        with torch.no_grad():
            return denoiser.hidden_states(tokens, mask, torch.ones_like(mask), blocks)

    return run


@pytest.fixture
def train_a_little() -> Callable[[TransformersDenoiser], None]:
    """train_a_little(denoiser) moves its adapter away from the identity."""

    def move(denoiser):
        with torch.no_grad():
            for name, parameter in denoiser.module.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator_for(8, name)) * 0.2)

    return move
