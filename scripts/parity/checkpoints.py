"""Write the tiny random checkpoints that scripts/parity/published.py decodes, in the layout of the released ones.

python scripts/parity/checkpoints.py FOLDER
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from cases import CHARACTERS, GAIN, MAX_LENGTH, SEED, SHAPE

from dllm_rl.models.create import create_denoiser
from dllm_rl.models.denoiser import TransformersDenoiser
from dllm_rl.models.loading import save_denoiser
from dllm_rl.models.tokenizers import character_tokenizer


def denoiser(family: str) -> TransformersDenoiser:
    """The model of a family; its weights depend on nothing but the constants of cases.py."""
    block = {"block_size": 4, "block_origin": "sequence"} if family == "sdar" else {}
    tokenizer = character_tokenizer(CHARACTERS)
    made = create_denoiser(family, tokenizer, max_length=MAX_LENGTH, seed=SEED, **SHAPE, **block)
    with torch.no_grad():
        for parameter in made.module.parameters():
            if parameter.dim() >= 2:
                parameter.mul_(GAIN)
    return made


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    for name in ("llada", "dream", "sdar"):
        save_denoiser(denoiser(name), character_tokenizer(CHARACTERS), folder / name)
    # Dream's class does not load without one; that of the released checkpoint holds special tokens beside this key.
    (folder / "dream" / "generation_config.json").write_text(json.dumps({"_from_model_config": True}))
