"""Rows to batches: padding on the right, and which positions are completion, tail, given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dllm_rl.diffusion.layout import block_index
from dllm_rl.errors import UserError
from dllm_rl.protocols.denoiser import Denoiser
from dllm_rl.types import GIVEN, Prompt, RolloutBatch, Trajectory


def collate(
    trajectories: Sequence[Trajectory],
    denoiser: Denoiser,
    *,
    group: Sequence[int],
    expert: Sequence[bool] | None = None,
    episode: Sequence[int] | None = None,
    turn: Sequence[int] | None = None,
) -> RolloutBatch:
    """A batch of rollouts.

    Args:
        trajectories: at least one.
        denoiser: says how rows are padded, and where its blocks are.
        group: group number of each row; rows of one prompt share it.
        expert: which rows an expert's strategy decoded; None = none.
        episode: number of the sample that each row is a turn of; None = every row is a sample of its own.
        turn: number of the turn within it; None = 0.
    """
    width = max(len(t.tokens) for t in trajectories)
    start = torch.tensor([t.prompt_length for t in trajectories])
    end = start + torch.tensor([t.completion_length for t in trajectories])
    position = torch.arange(width)
    valid = position < torch.tensor([len(t.tokens) for t in trajectories])[:, None]
    step = _padded([t.unmask_step for t in trajectories], width, GIVEN)
    canvas = valid & (position >= start[:, None])
    completion = canvas & (position < end[:, None])
    return RolloutBatch(
        tokens=_padded([t.tokens for t in trajectories], width, denoiser.pad_id),
        valid=valid,
        completion=completion,
        hint=completion & (step == GIVEN),
        tail=canvas & (position >= end[:, None]),
        unmask_step=step,
        behaviour_logp=_padded([t.behaviour_logp for t in trajectories], width, 0.0),
        prompt_length=start,
        group=torch.tensor(group),
        num_forwards=torch.tensor([t.num_forwards for t in trajectories]),
        weights_step=_padded([t.weights_step for t in trajectories], width, GIVEN),
        block_ids=_block_ids(start, width, denoiser),
        exact=all(t.exact for t in trajectories),
        order=_if_all([t.order for t in trajectories], lambda rows: _padded(rows, width, 0)),
        sampled_logp=_if_all([t.sampled_logp for t in trajectories], lambda rows: _padded(rows, width, 0.0)),
        confidence=_if_all([t.confidence for t in trajectories], lambda rows: _stacked(rows, width)),
        expert=None if expert is None else torch.tensor(expert),
        episode=torch.arange(len(start)) if episode is None else torch.tensor(episode),
        turn=torch.zeros_like(start) if turn is None else torch.tensor(turn),
    ).check()


def supervised(
    prompts: Sequence[Prompt],
    completions: Sequence[Sequence[int]],
    denoiser: Denoiser,
    *,
    group: Sequence[int],
    max_new_tokens: int,
    pad_to_canvas: bool = False,
) -> RolloutBatch:
    """A batch of demonstrations.

    A completion shorter than the canvas gets an EOS (Denoiser.eos_id); one that fills it exactly ends without. Nothing
    was decoded, so every unmask_step is GIVEN and no trajectory can be replayed.

    Args:
        prompts: one per row.
        completions: tokens without EOS, one per row.
        denoiser: says what ends a row and pads it, and where its blocks are.
        group: group number of each row; the completions of a pair share it.
        max_new_tokens: canvas length.
        pad_to_canvas: fill the canvas with scored EOS tokens, as LLaDA's SFT does.
    Raises:
        UserError: see check_completion.
    """
    rows: list[Tensor] = []
    for prompt, completion in zip(prompts, completions, strict=True):
        check_completion(prompt.uid, completion, denoiser, max_new_tokens)
        target = [*completion, denoiser.eos_id][:max_new_tokens]
        if pad_to_canvas:
            target += [denoiser.eos_id] * (max_new_tokens - len(target))
        rows.append(torch.tensor([*prompt.token_ids, *target]))
    width = max(map(len, rows))
    start = torch.tensor([len(prompt.token_ids) for prompt in prompts])
    position = torch.arange(width)
    valid = position < torch.tensor([len(row) for row in rows])[:, None]
    return RolloutBatch(
        tokens=_padded(rows, width, denoiser.pad_id),
        valid=valid,
        completion=valid & (position >= start[:, None]),
        hint=torch.zeros_like(valid),
        tail=torch.zeros_like(valid),
        unmask_step=torch.full(valid.shape, GIVEN),
        behaviour_logp=torch.zeros(valid.shape),
        prompt_length=start,
        group=torch.tensor(group),
        num_forwards=torch.zeros(len(rows), dtype=torch.int64),
        weights_step=torch.full(valid.shape, GIVEN),
        block_ids=_block_ids(start, width, denoiser),
        exact=True,
    ).check()


def check_completion(uid: str, completion: Sequence[int], denoiser: Denoiser, max_new_tokens: int) -> None:
    """Refuse a completion that is empty, longer than the canvas, or holds the mask token, which no model may learn.

    Raises:
        UserError: naming the example.
    """
    if denoiser.mask_id in completion:
        raise UserError(
            f"example '{uid}': token {list(completion).index(denoiser.mask_id)} of its completion is the model's mask "
            f"token; take its text out of the completion, or declare the token special in tokenizer_config.json"
        )
    if not 0 < len(completion) <= max_new_tokens:
        raise UserError(
            f"example '{uid}': its completion has {len(completion)} tokens, sampling.max_new_tokens is "
            f"{max_new_tokens}; raise it, or shorten the completion"
            if completion
            else f"example '{uid}': its completion is empty"
        )


def completion_texts(trajectories: Sequence[Trajectory], tokenizer: Any, *, special: bool = False) -> list[str]:
    """Completions as text, up to the first end token and without it.

    Args:
        trajectories: how they were decoded.
        tokenizer: of the model.
        special: True keeps special tokens inside a completion visible, for records of what was generated; reward
            functions see the text without them.
    """
    return [tokenizer.decode(_before_end(t).tolist(), skip_special_tokens=not special) for t in trajectories]


def _block_ids(start: Tensor, width: int, denoiser: Denoiser) -> Tensor | None:
    size = denoiser.block_size
    return None if size is None else block_index(start, width, size, denoiser.block_origin)


def _before_end(t: Trajectory) -> Tensor:
    length = t.completion_length - (t.finish == "eos")
    return t.tokens[t.prompt_length : t.prompt_length + length]


def _if_all(rows: Sequence[Tensor | None], pad: Callable[[Sequence[Tensor]], Tensor]) -> Tensor | None:
    known = [row for row in rows if row is not None]
    return pad(known) if len(known) == len(rows) else None


def _stacked(rows: Sequence[Tensor], width: int) -> Tensor:
    out = torch.zeros(len(rows), max(map(len, rows)), width)
    for place, row in enumerate(rows):
        out[place, : len(row), : row.shape[1]] = row
    return out


def _padded(rows: Sequence[Tensor], width: int, fill: float) -> Tensor:
    out = torch.full((len(rows), width), fill, dtype=rows[0].dtype)
    for place, row in enumerate(rows):
        out[place, : len(row)] = row
    return out
