"""What every model family must keep to; see dllm_rl.models.family."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dllm_rl import registry
from dllm_rl.conformance import cases
from dllm_rl.conformance.violation import require
from dllm_rl.diffusion.layout import block_index
from dllm_rl.errors import UserError
from dllm_rl.models.denoiser import TransformersDenoiser
from dllm_rl.models.families import family_named
from dllm_rl.models.loading import load_denoiser, save_denoiser
from dllm_rl.models.tokenizers import character_tokenizer
from dllm_rl.seeding import generator_for

LENGTH = 2 * cases.BLOCK
TOKENS = 3 + torch.arange(2 * LENGTH).view(2, LENGTH) * 7 % 10
VALID = torch.arange(LENGTH) < torch.tensor([[LENGTH], [LENGTH - 1]])  # the second row is padded
MASK = VALID & torch.isin(torch.arange(LENGTH), torch.tensor([LENGTH - 3, LENGTH - 1]))
TOLERANCE = 1e-4  # float32; logits are of order 1


class Subject:
    """A family, a random model of it, and the same one saved and loaded again."""

    def __init__(self, name: str, options: Mapping[str, Any]) -> None:
        if options:
            raise UserError(f"model family '{name}' takes no options, got {', '.join(options)}")
        self.name, self.family = name, family_named(name)
        self.tokenizer = character_tokenizer("0123456789")
        self._scratch = tempfile.TemporaryDirectory()
        self.folder = Path(self._scratch.name)

    def close(self) -> None:
        """Remove the checkpoint."""
        self._scratch.cleanup()

    @cached_property
    def made(self) -> TransformersDenoiser:
        """A new model; norms and biases are random too."""
        made = cases.denoiser(self.name)
        with torch.no_grad():
            for name, parameter in made.module.named_parameters():
                if parameter.dim() == 1:
                    parameter.add_(torch.rand(parameter.shape, generator=generator_for(0, "conformance", name)))
        return made

    @cached_property
    def loaded(self) -> TransformersDenoiser:
        """What comes back of it."""
        save_denoiser(self.made, self.tokenizer, self.folder)
        return load_denoiser(self.folder, family=self.family)[0]


@torch.no_grad()
def _logits(
    model: TransformersDenoiser, tokens: Tensor = TOKENS, rows: slice = slice(None), end: int = LENGTH
) -> Tensor:
    """Of the hidden positions."""
    tokens, mask, valid = (x[rows, :end] for x in (tokens, MASK, VALID))
    return model.unembed(model.hidden_states(tokens, mask, valid, _blocks(model, *tokens.shape))[mask])


def _blocks(model: TransformersDenoiser, num_rows: int, length: int) -> Tensor | None:
    if model.block_size is None:
        return None
    return block_index(torch.full((num_rows,), cases.BLOCK), length, cases.BLOCK, "response")


def _near(got: Tensor, want: Tensor, what: str) -> None:
    off = float((got - want).abs().max())
    require(off <= TOLERANCE, f"{what}: off by up to {off:.2g}")


def it_alone_recognises_its_config(subject: Subject) -> None:
    """The config.json that ``new_config`` writes matches the family, and no other that is registered."""
    config, registered = subject.made.config, {name: family_named(name) for name in registry.names("families")}
    require(subject.family.matches(config), f"matches() is false, model_type = {config.get('model_type')!r}")
    others = [name for name, other in registered.items() if other != subject.family and other.matches(config)]
    require(not others, f"{', '.join(others)} match too; declare architectures, required_keys or absent_keys")


def names_translate_both_ways(subject: Subject) -> None:
    """Every weight has a name of its own in checkpoints, and that name leads back to it."""
    owners: dict[str, str] = {}
    for name, _ in subject.made.module.named_parameters():
        original = subject.family.to_original_name(name)
        back, other = subject.family.to_module_name(original), owners.setdefault(original, name)
        require(back == name, f"{name} is stored as {original}, which is read as {back}")
        require(other == name, f"{name} and {other} are both stored as {original}")


def a_checkpoint_comes_back(subject: Subject) -> None:
    """A model that is saved in the family's layout and loaded again has the same weights and logits, bit for bit."""
    weights = dict(subject.loaded.module.named_parameters())
    for name, parameter in subject.made.module.named_parameters():
        require(name in weights and torch.equal(parameter, weights[name]), f"{name} is another tensor")
    require(torch.equal(_logits(subject.made), _logits(subject.loaded)), "the logits differ")


def what_it_does_not_know_is_kept(subject: Subject) -> None:
    """Loading and saving keep every key of config.json, and the code files beside it."""
    assert subject.loaded
    file, code = subject.folder / "config.json", subject.folder / "modeling_own.py"
    before = json.loads(file.read_text()) | {"auto_map": {"AutoModel": "modeling_own.Own"}}
    file.write_text(json.dumps(before))
    code.write_text("raise RuntimeError('code of a checkpoint must not run')\n")
    save_denoiser(load_denoiser(subject.folder, family=subject.family)[0], subject.tokenizer, subject.folder / "again")
    after = json.loads((subject.folder / "again" / "config.json").read_text())
    odd = sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))
    require(not odd, f"config.json: {', '.join(odd)} changed")
    require((subject.folder / "again" / code.name).is_file(), f"{code.name} is gone")


def special_tokens_have_their_ids(subject: Subject) -> None:
    """The mask, end and padding tokens, the vocabulary and the longest sequence are read as they were written."""
    for name in ("mask_id", "eos_id", "pad_id", "vocab_size", "max_length"):
        got, want = getattr(subject.loaded, name), getattr(subject.made, name)
        require(got == want, f"{name} = {got}, written {want}")


def every_lora_target_matches(subject: Subject) -> None:
    """Every LoRA target is a linear layer of the module, which checkpoints call so."""
    linear = [path for path, layer in subject.made.module.named_modules() if isinstance(layer, nn.Linear)]
    require(subject.family.lora_targets, "no LoRA targets")
    for own, suffix in subject.family.lora_targets.items():
        found = [subject.family.to_original_name(path) for path in linear if path.endswith(f".{suffix}")]
        require(found, f"'{own}': no linear layer is called {suffix}")
        require(all(path.endswith(f".{own}") for path in found), f"'{own}' is called {found[0]} in checkpoints")


def predictions_are_the_modules_own(subject: Subject) -> None:
    """Logits are those that the module itself gives, one position on if the family is shifted, which cannot hide 0."""
    model, first = subject.made, torch.arange(LENGTH).expand(2, -1) == 0
    noised = torch.where(MASK, model.mask_id, TOKENS)
    blocks = None if model.block_size is None else torch.zeros_like(TOKENS)
    with torch.no_grad():
        own = model.module(input_ids=noised, attention_mask=VALID[:, None, None, :]).logits
        got = model.unembed(model.hidden_states(TOKENS, MASK, VALID, blocks).flatten(0, 1)).view_as(own)
    both = (got[:, 1:], own[:, :-1]) if subject.family.shift else (got, own)
    _near(*(x[VALID[:, -x.shape[1] :]] for x in both), "logits")
    try:
        model.hidden_states(TOKENS, first, VALID, blocks)
    except UserError:
        require(subject.family.shift, "hiding position 0 is refused")
    else:
        require(not subject.family.shift, "position 0 was hidden, which nothing before it predicts")


def what_is_hidden_does_not_leak(subject: Subject) -> None:
    """Predictions depend neither on the tokens under the mask, nor on padding, nor on whether there is any."""
    want = _logits(subject.made)
    other = torch.where(MASK | ~VALID, 3 + (TOKENS - 2) % 10, TOKENS)
    _near(_logits(subject.made, other), want, "other tokens under the mask and in the padding")
    alone = _logits(subject.made, rows=slice(1, 2), end=LENGTH - 1)
    _near(alone, want[-len(alone) :], "the second row without its padding")


def what_is_visible_is_seen(subject: Subject) -> None:
    """Every visible token of a row, before or after, changes the prediction at every hidden position of it."""
    before = _logits(subject.made)
    for position in torch.nonzero(~MASK.any(0)).flatten().tolist():
        tokens = TOKENS.clone()
        tokens[:, position] = 3 + (tokens[:, position] - 2) % 10
        blind = MASK.nonzero()[(_logits(subject.made, tokens) == before).all(-1)]
        require(not len(blind), f"(row, position) {blind.tolist()} do not see position {position}")


@torch.no_grad()
def a_cache_changes_nothing(subject: Subject) -> None:
    """Of a block-causal family: a prompt that is kept in a cache is attended to as if it were computed again."""
    model, start = subject.made, cases.BLOCK
    blocks = _blocks(model, *TOKENS.shape)
    if blocks is None:
        return
    cache = model.prefill(TOKENS[:, :start], VALID[:, :start], blocks[:, :start])
    window = torch.where(MASK, model.mask_id, TOKENS)[:, start:]
    positions = torch.arange(start, LENGTH).expand(2, -1)
    hidden = model.extend(cache, window, positions, VALID[:, start:], commit=False)
    _near(model.unembed(hidden[MASK[:, start:]]), _logits(model), "logits over the cache")


CHECKS: tuple[Callable[[Subject], None], ...] = (
    it_alone_recognises_its_config,
    names_translate_both_ways,
    a_checkpoint_comes_back,
    what_it_does_not_know_is_kept,
    special_tokens_have_their_ids,
    every_lora_target_matches,
    predictions_are_the_modules_own,
    what_is_hidden_does_not_leak,
    what_is_visible_is_seen,
    a_cache_changes_nothing,
)
