"""Rows, forwards and floating-point operations of a run, by formula.

Operations are 2 P + 4 (layers) (width) (context) for a token of a forward; a backward costs twice that, or once where
the weights are frozen below an adapter, and once more where layers are recomputed. Rows are taken to fill their canvas,
and strategies that decide to commit one token per forward, so that the operations are an upper bound. Left out are
held-out evaluations and what depends on rewards: hints of IGPO, rows that are dropped.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import torch

from dllm_rl.config.plugins import build
from dllm_rl.config.schema import Config, LoraSection
from dllm_rl.diffusion.layout import block_index
from dllm_rl.driver.step_masks import step_masks
from dllm_rl.models.denoiser import TransformersDenoiser
from dllm_rl.planning.dry_run import head_width
from dllm_rl.protocols.algorithm import Algorithm
from dllm_rl.types import GIVEN, RolloutBatch, Sampling


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Sizes of a checkpoint's config.json."""

    layers: int
    width: int
    keys: int  # width of all key heads
    mlp: int
    vocab: int
    block_causal: bool = False
    block_size: int | None = None

    @classmethod
    def of(cls, denoiser: TransformersDenoiser) -> Self:
        """Of a model; its layers are taken to be those of Llama, which decides operations, not bytes."""
        config: Any = denoiser.module.config
        return cls(
            layers=config.num_hidden_layers,
            width=config.hidden_size,
            keys=config.num_key_value_heads * head_width(config),
            mlp=config.intermediate_size,
            vocab=config.vocab_size,
            block_causal=denoiser.block_size is not None,
            block_size=denoiser.block_size,
        )

    @property
    def linear(self) -> int:
        """Weights of the linear layers of all transformer layers."""
        return self.layers * (2 * self.width * (self.width + self.keys) + 3 * self.width * self.mlp)

    @property
    def parameters(self) -> int:
        """Of the model, but for norms and biases; embeddings are not tied."""
        return self.linear + 2 * self.vocab * self.width

    def adapter(self, lora: LoraSection) -> int:
        """Parameters of an adapter."""
        d, m = self.width, self.mlp
        sizes = {"q_proj": (d, d), "k_proj": (d, self.keys), "v_proj": (d, self.keys), "up_proj": (d, m)}
        assert lora.targets is not None and set(lora.targets) <= set(sizes), "no file has others"
        return self.layers * lora.rank * sum(sum(sizes[name]) for name in lora.targets)

    def forward(self, tokens: int, context: int) -> float:
        """Floating-point operations of a forward of so many tokens, each of which attends to the context."""
        return tokens * (2.0 * self.parameters + 4.0 * self.layers * self.width * context)


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What a run comes to.

    Attributes:
        steps: batches.
        prompts: of a step; rows of a file for supervised training.
        samples: completions per prompt, of the policy and of experts; 1 or 2 for demonstrations and pairs.
        decoded: whether they are decoded.
        updates_per_step: optimiser updates of a step.
        canvas: tokens of a completion at most.
        forwards: of a completion at most, without those that only store keys and values.
        draws: forwards per likelihood and row.
        decoding: floating-point operations of the rollouts.
        scoring: of likelihoods without gradient, before the updates.
        updating: of the updates.
    """

    steps: int
    prompts: int
    samples: int
    decoded: bool
    updates_per_step: int
    canvas: int
    forwards: int
    draws: int
    decoding: float
    scoring: float
    updating: float

    @property
    def rows(self) -> int:
        """Of a step."""
        return self.prompts * self.samples

    @property
    def flop(self) -> float:
        """Floating-point operations of the run."""
        return self.decoding + self.scoring + self.updating

    def hours(self, flops: float) -> float:
        """Of one device that does so many floating-point operations per second."""
        return self.flop / flops / 3600


def work_of(config: Config, shape: Shape, prompt_tokens: int) -> Work:
    """What a configuration comes to.

    Args:
        config: of the run.
        shape: of its model.
        prompt_tokens: of a prompt with its template.
    """
    canvas, learner = config.sampling.max_new_tokens, config.learner
    algorithm: Algorithm = build("algorithms", config.algorithm.name, config.algorithm.options)
    needs, sampling = algorithm.needs, sampling_of(config)
    block = block_of(config, shape)
    steps_per_block = sampling.steps_per_block(block)
    forwards, whole = canvas // block * steps_per_block, prompt_tokens + canvas
    turns, learned_turns = turns_of(config, algorithm)
    samples = samples_of(config, algorithm)
    rows = config.run.steps * config.data.prompts_per_step * samples
    if needs.source != "rollouts":
        decoding = 0.0
    elif shape.block_causal:  # committed blocks are cached, at the cost of one more forward each
        decoding = shape.forward(prompt_tokens, prompt_tokens)
        decoding += shape.forward((forwards + canvas // block) * block, whole)
    else:
        decoding = turns * forwards * shape.forward(whole, whole)
    masks = step_masks(algorithm, full_rows(config, shape, prompt_tokens), config, 0)
    draws, sets = masks[0].mask.shape[0], len(masks)
    tokens = prompt_tokens + canvas * (2 if shape.block_causal else 1)
    scored = learned_turns * draws * shape.forward(tokens, whole)
    parts = min(learner.minibatches, config.data.prompts_per_step)
    # A first update on the whole batch scores the old policy itself.
    old = needs.old * (sets if parts > 1 else sets - 1)
    backward = 1 if config.model.lora is not None else 2
    update = 2 + backward + config.model.gradient_checkpointing  # without a graph, with one, backward, recomputation
    trains = "model" in needs.trains
    return Work(
        steps=config.run.steps,
        prompts=config.data.prompts_per_step,
        samples=samples,
        decoded=needs.source == "rollouts",
        updates_per_step=learner.updates_per_step * parts,
        canvas=canvas,
        forwards=turns * forwards,
        draws=learned_turns * draws,
        decoding=rows * decoding,
        scoring=trains * rows * (old + sets * (needs.reference + needs.entropy)) * scored,
        updating=trains * rows * learner.updates_per_step * update * scored,
    )


def sampling_of(config: Config) -> Sampling:
    """Decoding while training."""
    return Sampling(**config.sampling.model_dump(exclude={"preset", "strategy"}))


def samples_of(config: Config, algorithm: Algorithm) -> int:
    """Completions per prompt, those of experts too."""
    samples = {"rollouts": config.data.samples_per_prompt, "demonstrations": 1, "pairs": 2}[algorithm.needs.source]
    return samples + len(getattr(algorithm.config, "experts", None) or ())


def turns_of(config: Config, algorithm: Algorithm) -> tuple[int, int]:
    """Turns of a sample, and those of them that are learned from; of other environments they depend on the answers."""
    rollouter = config.rollout.rollouter
    if rollouter.name != "denoising_steps":
        return 1, 1
    turns = -(-config.sampling.max_new_tokens // rollouter.options["tokens_per_step"])
    return turns, min(turns, algorithm.config.steps)


def block_of(config: Config, shape: Shape) -> int:
    """Tokens of a decoding block."""
    block = config.model.block_size or shape.block_size if shape.block_causal else config.sampling.block_size
    return block or config.sampling.max_new_tokens


def full_rows(config: Config, shape: Shape, prompt_tokens: int, *, rows: int = 1) -> RolloutBatch:
    """Rows of a group that fill their canvas, decoded block by block with as many tokens in every forward.

    Args:
        config: of the run.
        shape: of its model.
        prompt_tokens: of the prompt.
        rows: samples of the prompt; their completions differ in every token.
    """
    canvas, block = config.sampling.max_new_tokens, block_of(config, shape)
    steps_per_block = sampling_of(config).steps_per_block(block)
    length, start = prompt_tokens + canvas, torch.full((rows,), prompt_tokens)
    valid = torch.ones(rows, length, dtype=torch.bool)
    completion = valid & (torch.arange(length) >= prompt_tokens)
    place = torch.arange(canvas)
    step = torch.full((rows, length), GIVEN)
    step[:, prompt_tokens:] = place // block * steps_per_block + place % block * steps_per_block // block
    return RolloutBatch(
        tokens=torch.where(completion, torch.arange(rows)[:, None], 0),
        valid=valid,
        completion=completion,
        hint=torch.zeros_like(valid),
        tail=torch.zeros_like(valid),
        unmask_step=step,
        behaviour_logp=torch.zeros(rows, length),
        prompt_length=start,
        group=torch.zeros(rows, dtype=torch.int64),
        num_forwards=torch.full((rows,), canvas // block * steps_per_block),
        weights_step=step.clamp(max=0),
        block_ids=block_index(start, length, block, "response") if shape.block_causal else None,
        exact=True,
    ).check()
