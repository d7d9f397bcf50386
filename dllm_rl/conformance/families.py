"""What every model family must keep to; see dllm_rl.models.family."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from dllm_rl import registry
from dllm_rl.conformance import cases
from dllm_rl.conformance.violation import no_options, require
from dllm_rl.models.denoiser import TransformersDenoiser
from dllm_rl.models.families import family_named
from dllm_rl.models.loading import load_denoiser, save_denoiser
from dllm_rl.seeding import generator_for

LENGTH = 2 * cases.BLOCK
TOKENS = 3 + torch.arange(2 * LENGTH).view(2, LENGTH) * 7 % 10
VALID = torch.arange(LENGTH) < torch.tensor([[LENGTH], [LENGTH - 1]])  # the second row is padded
MASK = VALID & torch.isin(torch.arange(LENGTH), torch.tensor([LENGTH - 3, LENGTH - 1]))
BLOCKS = torch.arange(LENGTH).expand(2, -1) // cases.BLOCK
TOLERANCE = 1e-4  # float32; logits are of order 1


class Subject:
    """A family, a random model of it, and the same one saved and loaded again."""

    def __init__(self, name: str, options: Mapping[str, Any]) -> None:
        no_options("families", name, options)
        self.name, self.family = name, family_named(name)
        self.tokenizer = cases.tokenizer()

    @cached_property
    def made(self) -> TransformersDenoiser:
        """A new model; norms and biases are random too."""
        made = cases.denoiser(self.name)
        with torch.no_grad():
            for name, parameter in made.module.named_parameters():
                parameter.add_(0.1 * torch.rand(parameter.shape, generator=generator_for(0, "conformance", name)))
        return made

    @cached_property
    def loaded(self) -> TransformersDenoiser:
        """What comes back of it."""
        with TemporaryDirectory() as folder:
            save_denoiser(self.made, self.tokenizer, folder)
            return load_denoiser(folder, family=self.family)[0]


@torch.no_grad()
def _logits(model: TransformersDenoiser, tokens: Tensor = TOKENS, blocks: Tensor = BLOCKS) -> Tensor:
    hidden = model.hidden_states(tokens, MASK, VALID, blocks if model.block_size else None)
    return model.unembed(hidden.flatten(0, 1)).unflatten(0, MASK.shape)


def it_alone_recognises_its_config(subject: Subject) -> None:
    """The config.json that ``new_config`` writes matches the family, and no other that is registered."""
    config, known = subject.made.config, map(family_named, registry.names("families"))
    require(subject.family.matches(config), f"matches() is false, model_type = {config.get('model_type')!r}")
    others = [other.name for other in known if other != subject.family and other.matches(config)]
    require(not others, f"{', '.join(others)} matches too; declare architectures, required_keys or absent_keys")


def names_translate_both_ways(subject: Subject) -> None:
    """The name of a weight in checkpoints leads back to that weight, so that no two share one."""
    for name, _ in subject.made.module.named_parameters():
        back = subject.family.to_module_name(subject.family.to_original_name(name))
        require(back == name, f"{name} is stored as {subject.family.to_original_name(name)}, which is read as {back}")


def a_checkpoint_comes_back(subject: Subject) -> None:
    """Saved in the family's layout and loaded again, a model has the same token ids, weights and logits, to the bit."""
    made, loaded = subject.made, subject.loaded
    for name in ("mask_id", "eos_id", "pad_id", "vocab_size", "max_length"):
        require(getattr(loaded, name) == getattr(made, name), f"{name} = {getattr(loaded, name)} is another one")
    weights = dict(loaded.module.named_parameters())
    for name, parameter in made.module.named_parameters():
        require(torch.equal(parameter, weights[name]), f"{name} is another tensor")
    require(torch.equal(_logits(made), _logits(loaded)), "the logits differ")


def what_it_does_not_know_is_kept(subject: Subject) -> None:
    """Loading and saving keep every key of config.json, and the code files beside it."""
    config = {**subject.loaded.config, "auto_map": {"AutoModel": "modeling_own.Own"}}
    with TemporaryDirectory() as name:
        folder = Path(name)
        save_denoiser(subject.made, subject.tokenizer, folder)
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "modeling_own.py").write_text("raise RuntimeError('code of a checkpoint must not run')")
        save_denoiser(load_denoiser(folder, family=subject.family)[0], subject.tokenizer, folder / "again")
        kept = json.loads((folder / "again" / "config.json").read_text())
        odd = [key for key, value in config.items() if kept.get(key, "absent") != value and key != "torch_dtype"]
        require(not odd and (folder / "again/modeling_own.py").is_file(), f"changed: {odd or 'modeling_own.py'}")


def every_lora_target_matches(subject: Subject) -> None:
    """Every LoRA target is a linear layer of the module, which checkpoints call so."""
    linear = [path for path, layer in subject.made.module.named_modules() if isinstance(layer, nn.Linear)]
    for own, suffix in subject.family.lora_targets.items():
        found = [subject.family.to_original_name(path) for path in linear if path.endswith(f".{suffix}")]
        right = found and all(path.endswith(f".{own}") for path in found)
        require(
            right, f"'{own}' is to be {suffix}, which is in checkpoints: {', '.join(found[:1]) or 'no linear layer'}"
        )


def predictions_are_the_modules_own(subject: Subject) -> None:
    """Logits are those that the module gives; of a shifted family those of one position before."""
    model, shift = subject.made, subject.family.shift
    with torch.no_grad():
        inputs = torch.where(MASK, model.mask_id, TOKENS)
        own = model.module(input_ids=inputs, attention_mask=VALID[:, None, None, :]).logits
    got = _logits(model, blocks=torch.zeros_like(TOKENS))
    off = float((got[:, shift:] - own[:, : LENGTH - shift])[VALID[:, shift:]].abs().max())
    require(off <= TOLERANCE, f"off by up to {off:.2g}")


def predictions_depend_on_what_is_visible_alone(subject: Subject) -> None:
    """Another token changes every prediction of its row if it is visible, and none if it is hidden or padding."""
    before = _logits(subject.made)[MASK]
    for position in range(LENGTH):
        tokens = torch.where(torch.arange(LENGTH) == position, 3 + (TOKENS - 2) % 10, TOKENS)
        moved = (_logits(subject.made, tokens)[MASK] - before).abs().amax(-1) > TOLERANCE
        visible = (VALID & ~MASK)[:, position, None].expand_as(MASK)[MASK]
        require(torch.equal(moved, visible), f"position {position}: {moved.tolist()}, expected {visible.tolist()}")


@torch.no_grad()
def a_cache_changes_nothing(subject: Subject) -> None:
    """Of a block-causal family: a prompt that is kept in a cache is attended to as if it were computed again."""
    model, start = subject.made, cases.BLOCK
    if model.block_size is not None:
        cache = model.prefill(TOKENS[:, :start], VALID[:, :start], BLOCKS[:, :start])
        window, positions = torch.where(MASK, model.mask_id, TOKENS)[:, start:], torch.arange(start, LENGTH)
        hidden = model.extend(cache, window, positions.expand(2, -1), VALID[:, start:], commit=False)
        off = float((model.unembed(hidden[MASK[:, start:]]) - _logits(model)[MASK]).abs().max())
        require(off <= TOLERANCE, f"off by up to {off:.2g}")
