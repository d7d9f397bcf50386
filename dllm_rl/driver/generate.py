"""Completions of a model without a run: load it, decode, see how each token was unmasked."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from dllm_rl.config.load import load_config
from dllm_rl.config.plugins import build, engine_class
from dllm_rl.config.schema import SamplingSection
from dllm_rl.config.section import Plugin
from dllm_rl.data.collate import completion_texts
from dllm_rl.data.prompts import encode
from dllm_rl.driver.start_model import model_folder, run_of
from dllm_rl.errors import UserError
from dllm_rl.models.checkpoint import read_weights, weight_files
from dllm_rl.models.denoiser import TransformersDenoiser
from dllm_rl.models.from_config import DTYPES, find_device
from dllm_rl.models.loading import checkpoint_folder, load_denoiser
from dllm_rl.models.lora import load_adapter
from dllm_rl.models.sources import base_of, is_adapter
from dllm_rl.models.tokenizers import vocabulary_digest
from dllm_rl.protocols.engine import TRAIN, EngineSetup, RolloutEngine, SharedModel
from dllm_rl.protocols.strategy import UnmaskingStrategy
from dllm_rl.types import Example, Sampling, Trajectory

DEFAULT_TOKENS = 128  # of a completion, if neither the caller nor a run says


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A model to decode with.

    Attributes:
        denoiser: the network, with its adapter if it has one.
        tokenizer: its tokenizer.
        sampling: how the run decoded that it is from, greedily; None without a run.
        system_prompt: what that run put before every prompt, or None.
    """

    denoiser: TransformersDenoiser
    tokenizer: Any
    sampling: SamplingSection | None = None
    system_prompt: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """A completion.

    Attributes:
        prompt: as the model saw it.
        text: of the completion, without what ends it.
        sample: its number among those of the prompt.
        tokens: (T,) token ids of the whole canvas.
        step: (T,) forward, from 0, that committed each of them; num_forwards if none did, since the text had ended.
        length: tokens up to and including the end.
        num_forwards: of the network.
        finish: "eos", or "length" if the canvas is full.
    """

    prompt: str
    text: str
    sample: int
    tokens: Tensor
    step: Tensor
    length: int
    num_forwards: int
    finish: str


def load(
    path: str | Path, *, dtype: str = "auto", device: str = "auto", revision: str | None = None, **options: Any
) -> Model:
    """A model from wherever it is.

    Args:
        path: a run (its newest checkpoint), a checkpoint, a model folder, an adapter folder, or a hub name.
        dtype: float32, bfloat16 or float64; "auto" = that of the weight files.
        device: "auto" (cuda if there is one), or a torch device.
        revision: of a hub model, or of an adapter's base.
        options: further ones of models.loading.load_denoiser, such as trust_remote_code; those of a run are its own.
    Raises:
        UserError: it cannot be found or loaded.
    """
    if dtype != "auto" and dtype not in DTYPES:
        raise UserError(f"dtype = {dtype!r}: one of auto, {', '.join(DTYPES)}")
    found = model_folder(path)
    adapter, run = is_adapter(found), run_of(found)
    known, sampling, system = {}, None, None
    if run is not None:
        config = load_config(run / "config.yaml")
        names = {"family", "block_size", "block_origin", "end_tokens", "trust_remote_code", "revision"}
        known = config.model.model_dump(include=names)
        sampling, system = config.sampling.model_copy(update={"temperature": 0.0}), config.data.system_prompt
    if revision is not None:
        known["revision"] = revision
    folder = checkpoint_folder(base_of(found) if adapter else found, known.get("revision"))
    chosen = next(read_weights(weight_files(folder)[0]))[1].dtype if dtype == "auto" else DTYPES[dtype]
    denoiser, tokenizer = load_denoiser(folder, dtype=chosen, device=find_device(device), **{**known, **options})
    if adapter:
        load_adapter(denoiser, found)
    denoiser.module.requires_grad_(False)
    return Model(denoiser=denoiser, tokenizer=tokenizer, sampling=sampling, system_prompt=system)


def generate(
    model: Model | str | Path,
    prompts: str | Sequence[str | list[dict[str, str]]],
    *,
    max_new_tokens: int | None = None,
    block_size: int | None = None,
    tokens_per_step: int | None = None,
    steps: int | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    strategy: str | Mapping[str, Any] | None = None,
    seed: int = 0,
    samples_per_prompt: int = 1,
    chat: bool = False,
    system_prompt: str | None = None,
) -> list[Generation]:
    """Complete prompts, those of a prompt one after the other.

    What is not given is as in the run that the model is from, or else the default of section sampling.

    Args:
        model: from load(), or what load() takes.
        prompts: text, taken as it is, or conversations; one text is one prompt.
        max_new_tokens: length of the canvas.
        block_size: decoding block; block-causal families have their own.
        tokens_per_step: positions committed per forward by count-based strategies.
        steps: denoising steps of the canvas, instead of tokens_per_step.
        temperature: 0 = greedy.
        top_k: keep the k most likely tokens.
        top_p: keep the smallest set of tokens with this probability.
        strategy: which positions to commit: a name, or a mapping of name and options.
        seed: of all randomness; a completion depends on it, its prompt, its place and number, not on other prompts.
        samples_per_prompt: completions of each prompt.
        chat: put text through the chat template, as a user's message.
        system_prompt: put before every prompt, as a system message.
    Raises:
        UserError: a prompt that does not fit, or options that the model cannot follow.
    """
    if steps is not None and tokens_per_step is not None:
        raise UserError(
            f"steps = {steps} and tokens_per_step = {tokens_per_step} both say how many positions a forward commits; "
            f"leave one of them out"
        )
    if not isinstance(model, Model):
        model = load(model)
    section = model.sampling or SamplingSection(temperature=0.0, max_new_tokens=DEFAULT_TOKENS)
    values = {f.name: getattr(section, f.name) for f in dataclasses.fields(Sampling)}
    if steps is not None:
        values["tokens_per_step"] = 1  # the two exclude each other
    if tokens_per_step is not None:
        values["steps"] = None
    given = {
        "max_new_tokens": max_new_tokens,
        "block_size": block_size,
        "tokens_per_step": tokens_per_step,
        "steps": steps,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
    }
    sampling = Sampling(**{**values, **{name: value for name, value in given.items() if value is not None}})
    engine = _engine(model, section.strategy if strategy is None else _plugin(strategy))
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    room = model.denoiser.max_length - sampling.max_new_tokens
    if room < 1:
        raise UserError(
            f"max_new_tokens = {sampling.max_new_tokens} leaves no room for a prompt: the model takes "
            f"{model.denoiser.max_length} tokens"
        )
    system = model.system_prompt if system_prompt is None else system_prompt
    encoded = [
        encode(
            Example(uid=f"prompt {i}", prompt=_message(text) if chat else text, answer="", task=""),
            model.tokenizer,
            max_prompt_tokens=room,
            system_prompt=system,
        )
        for i, text in enumerate(texts, start=1)
    ]
    trajectories = engine.generate(encoded, sampling, seed=seed, samples_per_prompt=samples_per_prompt)
    shown = {prompt.uid: prompt.text for prompt in encoded}
    found = zip(trajectories, completion_texts(trajectories, model.tokenizer), strict=True)
    return [_generation(shown[t.prompt_uid], text, t) for t, text in found]


def _message(text: str | list[dict[str, str]]) -> str | list[dict[str, str]]:
    return [{"role": "user", "content": text}] if isinstance(text, str) else text


def _plugin(strategy: str | Mapping[str, Any]) -> Plugin:
    return Plugin.model_validate({"name": strategy} if isinstance(strategy, str) else dict(strategy))


def _engine(model: Model, chosen: Plugin) -> RolloutEngine:
    strategy: UnmaskingStrategy = build("strategies", chosen.name, chosen.options)
    strategy.bind(vocabulary_digest(model.tokenizer), model.denoiser.device, trained_here=False)
    shared = SharedModel(denoiser=model.denoiser, tokenizer=model.tokenizer, strategies={TRAIN: strategy})
    kind, options = engine_class("native", {})
    setup = EngineSetup(
        rank=0,
        path=model.denoiser.source,
        strategies={TRAIN: chosen.model_dump()},
        trains=frozenset(),
        load=lambda: (model.denoiser, model.tokenizer),
        shared=shared,
    )
    engine: RolloutEngine = kind(options, setup)
    return engine


def _generation(prompt: str, text: str, t: Trajectory) -> Generation:
    return Generation(
        prompt=prompt,
        text=text,
        sample=t.sample,
        tokens=t.tokens[t.prompt_length :],
        step=t.unmask_step[t.prompt_length :],
        length=t.completion_length,
        num_forwards=t.num_forwards,
        finish=t.finish,
    )
