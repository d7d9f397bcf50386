"""Small cases that the checks share: ragged batches with early ends, tiny models."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from dllm_rl.diffusion.layout import block_index
from dllm_rl.models.create import create_denoiser
from dllm_rl.models.denoiser import TransformersDenoiser
from dllm_rl.models.families import family_named
from dllm_rl.models.tokenizers import character_tokenizer
from dllm_rl.protocols.algorithm import Needs
from dllm_rl.seeding import generator_for
from dllm_rl.types import GIVEN, Experience, GlobalCounts, LikelihoodEstimate, MaskSample, Rewards, RolloutBatch

CANVAS, BLOCK = 8, 4
_PROMPTS = (3, 3, 3, 2, 2, 2)
_COMPLETIONS = (8, 5, 8, 8, 8, 3)  # two rows end early: their canvas has a tail


def batch(*, block_causal: bool, decoded: bool = True, group_size: int = 3) -> RolloutBatch:
    """Six rows in groups, padded, some ended by EOS.

    Args:
        block_causal: as for a block-causal model with blocks of 4 from the response.
        decoded: with a trajectory that committed two tokens per forward, block by block; else as demonstrations are.
        group_size: rows per group.
    """
    generator = generator_for(0, "conformance", "batch")
    start = torch.tensor(_PROMPTS)
    end = start + torch.tensor(_COMPLETIONS)
    length = max(_PROMPTS) + CANVAS
    position = torch.arange(length)
    valid = position < (start + CANVAS if decoded else end)[:, None]
    canvas = valid & (position >= start[:, None])
    completion = canvas & (position < end[:, None])
    step = torch.full(valid.shape, GIVEN)
    if decoded:
        for row, first in enumerate(_PROMPTS):
            order = [torch.randperm(BLOCK, generator=generator) // 2 + 2 * b for b in range(CANVAS // BLOCK)]
            step[row, first : first + CANVAS] = torch.cat(order)
    tokens = torch.randint(3, 9, valid.shape, generator=generator)
    return RolloutBatch(
        tokens=torch.where(valid, tokens, 0),
        valid=valid,
        completion=completion,
        hint=torch.zeros_like(valid),
        tail=canvas & ~completion,
        unmask_step=step,
        behaviour_logp=-torch.rand(valid.shape, generator=generator) * completion,
        prompt_length=start,
        group=torch.arange(len(_PROMPTS)) // group_size,
        num_forwards=torch.full((len(_PROMPTS),), 4 if decoded else 0),
        weights_step=torch.where(step == GIVEN, GIVEN, 0),
        block_ids=block_index(start, length, BLOCK, "response") if block_causal else None,
        exact=True,
        order=torch.where(step >= 0, 1, 0),
        confidence=torch.rand(len(_PROMPTS), 4, length, generator=generator).clamp(0.05, 0.95) if decoded else None,
    ).check()


def rewards(total: list[float], excluded: int | None = None) -> Rewards:
    """Rewards with one component; an excluded row's verifier failed."""
    value = torch.tensor(total, dtype=torch.float32)
    included = torch.ones(len(total), dtype=torch.bool)
    if excluded is not None:
        included[excluded] = False
    return Rewards(
        components={"reward": value.masked_fill(~included, float("nan"))},
        total=value.masked_fill(~included, 0.0),
        included=included,
        solved=(value >= 1) & included,
        status=tuple("ok" if keep else "timeout" for keep in included.tolist()),
    )


MIXED = [1.0, 0.0, 0.5, 0.0, 1.0, 0.25]
PAIRS = [1.0, 0.0, 1.0, 0.0, 1.0, 0.0]


def estimate(rows: RolloutBatch, masks: MaskSample, needs: Needs, *, seed: int) -> LikelihoodEstimate:
    """Plausible float64 log-likelihoods: negative where the algorithm has something scored, 0 elsewhere."""

    def noise(where: Tensor) -> Tensor:
        drawn = torch.rand(where.shape, generator=generator_for(seed, "conformance", "logp"), dtype=torch.float64)
        return torch.where(where, -2 * drawn, 0.0)

    each = noise(masks.weight != 0) if needs.draws else None
    token = noise(rows.completion) if each is None else (each * masks.weight).sum(0)
    happened = torch.arange(int(rows.num_forwards.max())) < rows.num_forwards[:, None]
    return LikelihoodEstimate(
        token_logp=token if "model" in needs.trains else torch.zeros_like(token),
        draw_token_logp=each,
        choice_logp=noise(happened) if "policy" in needs.trains else None,
    )


def experience(
    rows: RolloutBatch,
    scored: Rewards,
    advantage: Tensor,
    masks: MaskSample,
    old: LikelihoodEstimate,
    reference: LikelihoodEstimate | None,
) -> Experience:
    """An Experience whose global counts are the batch's own."""
    return Experience(
        batch=rows,
        rewards=scored,
        advantage=advantage,
        masks=masks,
        old=old,
        reference=reference,
        counts=GlobalCounts.of(rows),
        entropy=torch.rand(rows.tokens.shape, generator=generator_for(4, "conformance", "entropy")),
    )


def tokenizer() -> PreTrainedTokenizerFast:
    """Ten digits."""
    return character_tokenizer("0123456789")


def denoiser(family: str, seed: int = 0) -> TransformersDenoiser:
    """A random model of a few thousand parameters whose predictions differ visibly from state to state."""
    made = create_denoiser(
        family,
        tokenizer(),
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        intermediate_size=48,
        max_length=64,
        block_size=BLOCK if family_named(family).block_causal else None,
        seed=seed,
    )
    with torch.no_grad():
        for parameter in made.module.parameters():
            if parameter.dim() >= 2:
                parameter.mul_(8)
    return made
