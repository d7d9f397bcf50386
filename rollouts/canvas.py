"""What every engine agrees on: requests, decoding blocks, and how a finished row becomes a Trajectory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dllm_rl.diffusion.layout import check_sampling
from dllm_rl.errors import UserError
from dllm_rl.protocols.denoiser import Denoiser
from dllm_rl.protocols.strategy import Candidates, UnmaskingStrategy
from dllm_rl.seeding import derive
from dllm_rl.types import GIVEN, Prompt, Sampling, Trajectory, WeightsVersion
from rollouts.choices import numbered


@dataclass(frozen=True, slots=True)
class Request:
    """One row to decode.

    Attributes:
        index: place in the result.
        prompt: the prompt.
        sample: number of the sample within the prompt's group.
        key: counter that all of the row's randomness hangs on.
        partial: where it was paused, or None.
    """

    index: int
    prompt: Prompt
    sample: int
    key: int
    partial: Trajectory | None

    def tokens(self, length: int, mask_id: int) -> Tensor:
        """(length,) int64: the prompt and the canvas with what is known of it, mask tokens elsewhere."""
        start = len(self.prompt.token_ids)
        tokens = torch.full((length,), mask_id)
        tokens[:start] = torch.tensor(self.prompt.token_ids)
        for offset, token in self.prompt.injected.items():
            tokens[start + offset] = token
        if self.partial is not None:
            known = self.partial.unmask_step < self.partial.num_forwards
            tokens[: len(known)][known] = self.partial.tokens[known]
        return tokens

    def masked(self, length: int, canvas: int) -> Tensor:
        """(length,) bool: the canvas without what is known of it."""
        start = len(self.prompt.token_ids)
        masked = torch.zeros(length, dtype=torch.bool)
        if self.partial is not None:
            masked[: start + canvas] = self.partial.unmask_step == self.partial.num_forwards
            return masked
        masked[start : start + canvas] = True
        masked[[start + offset for offset in self.prompt.injected]] = False
        return masked


def requests(
    denoiser: Denoiser,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    seed: int,
    samples_per_prompt: int,
    partial: Sequence[Trajectory] | None,
) -> list[Request]:
    """One request per row, prompt-major.

    Raises:
        UserError: a prompt that does not fit the model, an injected offset outside the canvas, a foreign block size,
            steps or guidance that the model cannot have, rows that were partial for other prompts.
    """
    if samples_per_prompt < 1:
        raise UserError(f"samples_per_prompt = {samples_per_prompt}: must be at least 1")
    if partial is not None:
        want = [(prompt.uid, sample) for prompt in prompts for sample in range(samples_per_prompt)]
        if [(t.prompt_uid, t.sample) for t in partial] != want:
            raise UserError("partial must hold the trajectories of the same prompts and samples, in the same order")
    check_sampling(denoiser, sampling)
    for prompt in prompts:
        length = len(prompt.token_ids) + sampling.max_new_tokens
        if length > denoiser.max_length:
            raise UserError(
                f"prompt '{prompt.uid}' has {len(prompt.token_ids)} tokens; with sampling.max_new_tokens = "
                f"{sampling.max_new_tokens} that is {length}, the model takes {denoiser.max_length}: shorten either"
            )
        if not prompt.token_ids:
            raise UserError(f"prompt '{prompt.uid}' is empty: a prompt needs at least one token")
        outside = [offset for offset in prompt.injected if not 0 <= offset < sampling.max_new_tokens]
        if outside:
            raise UserError(
                f"prompt '{prompt.uid}': injected offset {outside[0]} is outside the canvas of "
                f"{sampling.max_new_tokens} tokens"
            )
    return [
        Request(index, prompt, sample, derive(seed, prompt.uid, sample), None if partial is None else partial[index])
        for index, (prompt, sample) in enumerate((p, s) for p in prompts for s in range(samples_per_prompt))
    ]


def choose(strategy: UnmaskingStrategy, candidates: Candidates) -> Tensor:
    """(N, W) int64: what the strategy commits, numbered in the order of choice from 1; 0 where it does not.

    Raises:
        UserError: it broke its contract; without the check a row without a choice would decode forever.
    """
    order, eligible = strategy.select(candidates), candidates.eligible
    order = numbered(order) if order.dtype == torch.bool else order
    chosen = order > 0
    stuck = eligible.any(-1) & ~chosen.any(-1)
    if bool((stuck[:, None] | (chosen & ~eligible)).any()):
        what = "no position of a row that has eligible ones" if bool(stuck.any()) else "a position that is not eligible"
        raise UserError(
            f"strategy {type(strategy).__name__} selected {what}: select() must return a subset of candidates.eligible "
            "with at least one position in every row that has any"
        )
    return order


def both_logp(partial: Trajectory) -> Tensor:
    """(2, L) float32: log-probabilities of the model, and of the distribution drawn from."""
    own = partial.behaviour_logp
    return torch.stack([own, own if partial.sampled_logp is None else partial.sampled_logp])


def trajectory(
    request: Request,
    sampling: Sampling,
    *,
    tokens: Tensor,
    unmask_step: Tensor,
    logp: Tensor,
    order: Tensor,
    confidence: Tensor | None,
    num_forwards: int,
    denoiser: Denoiser,
    weights: WeightsVersion,
) -> Trajectory:
    """A finished or paused row.

    Args:
        request: what was asked for.
        sampling: for the canvas length.
        tokens: (>= L,) int64, prompt and canvas.
        unmask_step: (>= L,) int64; GIVEN where given or not decoded.
        logp: (2, >= L) float32; of the model, and of the distribution drawn from; 0 where not generated.
        order: (>= L,) int64; 0 where not decoded.
        confidence: (>= num_forwards, >= L) float32, or None.
        num_forwards: denoising forwards of the row.
        denoiser: says which tokens end a row, and what positions hold that were never decoded.
        weights: the weights that were used.
    """
    start = len(request.prompt.token_ids)
    length = start + sampling.max_new_tokens
    tokens, step, order = (t[:length].cpu().clone() for t in (tokens, unmask_step, order))
    own, sampled = logp[:, :length].cpu().clone()
    generated = step != GIVEN
    weights_step = torch.where(generated, weights.step, GIVEN)
    if request.partial is not None:
        earlier = generated & (step < request.partial.num_forwards)
        weights_step = torch.where(earlier, request.partial.weights_step, weights_step)
    ends = (generated & torch.isin(tokens, torch.tensor(denoiser.end_ids))).nonzero().flatten()
    completion_length = int(ends[0]) + 1 - start if len(ends) else sampling.max_new_tokens
    decoded = generated.clone()
    given = torch.zeros(length, dtype=torch.bool)
    given[:start] = True
    given[[start + offset for offset in request.prompt.injected]] = True
    never = ~(decoded | given)
    tokens[never], step[never] = denoiser.eos_id, num_forwards
    positions = decoded.nonzero().flatten()
    positions = positions[(step[positions] * (length + 1) + order[positions]).argsort(stable=True)]
    return Trajectory(
        prompt_uid=request.prompt.uid,
        sample=request.sample,
        tokens=tokens,
        prompt_length=start,
        completion_length=completion_length,
        events=torch.stack([step[positions], positions, tokens[positions]], dim=1),
        unmask_step=step,
        behaviour_logp=own,
        sampled_logp=None if sampling.plain else sampled,
        num_forwards=num_forwards,
        finish="eos" if len(ends) else "paused" if bool(never.any()) else "length",
        exact=True,
        weights=weights,
        weights_step=weights_step,
        order=order,
        confidence=None if confidence is None else confidence[:num_forwards, :length].cpu().clone(),
    )
