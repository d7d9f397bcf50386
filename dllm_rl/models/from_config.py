"""The model of a run, in whatever process needs it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dllm_rl import registry, seeding
from dllm_rl.config.schema import Config
from dllm_rl.errors import UserError, first_line
from dllm_rl.models.create import create_denoiser
from dllm_rl.models.denoiser import TransformersDenoiser
from dllm_rl.models.loading import load_denoiser, save_denoiser
from dllm_rl.models.lora import add_lora, load_adapter
from dllm_rl.models.quantize import quantize
from dllm_rl.models.sources import base_of, is_adapter
from dllm_rl.models.tokenizers import byte_bpe_tokenizer, character_tokenizer
from dllm_rl.protocols.task import Task
from dllm_rl.storage.files import explained
from dllm_rl.types import Example

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


def model_path(config: Config, folder: Path, task: Task, examples: Sequence[Example]) -> str:
    """Where the model is; one made from scratch is written to the run folder's ``initial`` first.

    Args:
        config: of the run.
        folder: the run folder.
        task: for the characters of a new tokenizer.
        examples: training examples, for the same.
    """
    m = config.model
    if m.init is None:
        assert m.path is not None, "the schema wants one of both"
        return m.path
    initial = folder / "initial"
    if not initial.exists():
        if m.family is None:
            raise UserError(f"model.init needs model.family: one of {', '.join(registry.names('families'))}")
        tokenizer = _tokenizer(m.init.tokenizer, m.init.vocab_size, task, examples)
        made = create_denoiser(
            m.family,
            tokenizer,
            **m.init.model_dump(exclude={"tokenizer", "vocab_size"}),
            block_size=m.block_size,
            block_origin=m.block_origin,
            seed=seeding.derive(config.run.seed, "model"),
        )
        hidden = folder / ".initial"  # renamed when whole: a run that is killed here starts anew
        with explained(f"'{initial}' cannot be written", folder):
            shutil.rmtree(hidden, ignore_errors=True)
            save_denoiser(made, tokenizer, hidden)
            hidden.rename(initial)
    return str(initial)


def load_model(
    config: Config, path: str, *, weights: bool = True, adapter: bool = True
) -> tuple[TransformersDenoiser, Any]:
    """The denoiser, with its adapter if the run trains one, and the tokenizer.

    Args:
        config: of the run.
        path: see model_path; of an adapter folder, the model is its base, and the adapter is trained on.
        weights: False leaves the parameters on the meta device: a driver asks for shapes and token ids only.
        adapter: False leaves the adapter out: an engine that is sent merged weights.
    """
    m = config.model
    device = find_device(m.device) if weights else torch.device("meta")
    small = weights and m.quantize is not None
    if small and device.type != "cuda":
        raise UserError(
            f"model.quantize = {m.quantize} needs a CUDA device: on '{device.type}' bitsandbytes unpacks every layer "
            f"at every forward, some shapes wrongly; leave it out, or set model.device: cuda on a machine that has one"
        )
    found = path if is_adapter(path) else None
    denoiser, tokenizer = load_denoiser(
        path if found is None else base_of(found),
        family=m.family,
        dtype=DTYPES[m.dtype],
        device="cpu" if small else device,
        revision=m.revision,
        block_size=m.block_size,
        block_origin=m.block_origin,
        end_tokens=m.end_tokens,
        trust_remote_code=m.trust_remote_code,
        chat_template=_chat_template(config.data.chat_template),
    )
    denoiser.started_from = found or ""
    if small:
        quantize(denoiser, device)
    if weights and adapter and found is not None:
        load_adapter(denoiser, found)
    elif weights and adapter and m.lora is not None:
        add_lora(denoiser, **m.lora.model_dump(), seed=seeding.derive(config.run.seed, "lora"))
    if weights and m.gradient_checkpointing:
        denoiser.module.gradient_checkpointing_enable()
    return denoiser, tokenizer


def _chat_template(given: str | None) -> str | None:
    """The text of a template; a file if it has none of Jinja's braces."""
    if given is None or "{" in given:
        return given
    path = Path(os.path.expandvars(os.path.expanduser(given)))
    if not path.is_file():
        raise UserError(f"data.chat_template: no file '{path}', and no template either: those have {{{{ ... }}}}")
    return path.read_text(encoding="utf-8")


def find_device(name: str) -> torch.device:
    """The device of a name; "auto" is cuda if there is one, else the CPU.

    Raises:
        UserError: there is no such device, or it cannot be used.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch has no one type for it
        raise UserError(f"model.device = '{name}' cannot be used ({first_line(error)}); auto, cpu or cuda") from error
    return device


def _tokenizer(kind: str, vocab_size: int, task: Task, examples: Sequence[Example]) -> Any:
    texts = [_text(e.prompt) + "".join(filter(None, (e.completion, e.chosen, e.rejected))) for e in examples]
    if kind == "characters":
        return character_tokenizer("".join(sorted({c for text in texts for c in text} | set(task.characters))))
    return byte_bpe_tokenizer(texts, vocab_size)


def _text(prompt: str | list[dict[str, str]]) -> str:
    return prompt if isinstance(prompt, str) else "\n".join(message["content"] for message in prompt)
