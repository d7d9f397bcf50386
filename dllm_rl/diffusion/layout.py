"""Which block a position belongs to, and who attends to whom in block-causal diffusion models."""

from __future__ import annotations

import torch
from torch import Tensor

from dllm_rl.errors import UserError
from dllm_rl.protocols.denoiser import Denoiser
from dllm_rl.types import BlockOrigin, Sampling


def block_index(prompt_length: Tensor, length: int, block_size: int, origin: BlockOrigin = "response") -> Tensor:
    """Block number of every position, rising from left to right.

    "response": block 0 starts at the first completion token; prompt blocks are counted from its right edge and are
    negative. "sequence": block 0 starts at position 0, so that a block may hold the end of the prompt and the
    start of the completion.

    Args:
        prompt_length: (N,) int64.
        length: L.
        block_size: tokens per block, at least 1.
        origin: where blocks start; rollout and training must agree.
    Returns:
        (N, L) int64.
    Source: Arriola et al. 2025, arXiv:2503.09573 (block diffusion); both origins exist in released code.
    """
    position = torch.arange(length, device=prompt_length.device).expand(len(prompt_length), length)
    start = prompt_length[:, None] if origin == "response" else torch.zeros_like(prompt_length)[:, None]
    return torch.div(position - start, block_size, rounding_mode="floor")


def block_rule(denoiser: Denoiser, sampling: Sampling) -> tuple[int, BlockOrigin]:
    """Size and origin of decoding blocks: the model's own, or the sampling's counted from the response."""
    if denoiser.block_size is not None:
        return denoiser.block_size, denoiser.block_origin
    return sampling.block_size or sampling.max_new_tokens, "response"


def check_sampling(denoiser: Denoiser, sampling: Sampling) -> None:
    """Refuse options of decoding that do not go with the model.

    Raises:
        UserError: blocks of another size than a block-causal model's, steps that do not divide over them, guidance of a
            model that cannot have it, token ids that it does not have.
    """
    for name in ("suppress_tokens", "defer_tokens"):
        beyond = [token for token in getattr(sampling, name) if not 0 <= token < denoiser.vocab_size]
        if beyond:
            raise UserError(
                f"sampling.{name}: the model has no token {beyond[0]}; its ids are 0 to {denoiser.vocab_size - 1}"
            )
    if denoiser.block_size is not None and sampling.block_size not in (None, denoiser.block_size):
        raise UserError(
            f"sampling.block_size = {sampling.block_size}, but this block-causal model decodes blocks of "
            f"{denoiser.block_size}; set sampling.block_size to {denoiser.block_size} or leave it out"
        )
    if sampling.cfg_scale and (denoiser.block_size is not None or denoiser.shift):
        raise UserError(
            f"sampling.cfg_scale = {sampling.cfg_scale}: guidance masks whole prompts, which block-causal models and "
            "models that predict the next position do not take; set sampling.cfg_scale to 0"
        )
    if sampling.steps is not None:
        sampling.steps_per_block(block_rule(denoiser, sampling)[0])


def block_causal(block_ids: Tensor, valid: Tensor) -> Tensor:
    """Attention of one clean copy: position i sees valid j with block_ids[j] <= block_ids[i].

    Args:
        block_ids: (N, L) int64.
        valid: (N, L) bool.
    Returns:
        (N, L, L) bool, query by key.
    """
    return (block_ids[:, None, :] <= block_ids[:, :, None]) & valid[:, None, :]


def clean_and_noised(block_ids: Tensor, valid: Tensor) -> Tensor:
    """Attention of the [clean | noised] layout.

    A clean position of block b sees clean blocks <= b; a noised one sees clean blocks < b and noised block b.

    Args:
        block_ids: (N, L) int64.
        valid: (N, L) bool.
    Returns:
        (N, 2L, 2L) bool, query by key, clean copy first.
    """
    earlier = (block_ids[:, None, :] < block_ids[:, :, None]) & valid[:, None, :]
    same = (block_ids[:, None, :] == block_ids[:, :, None]) & valid[:, None, :]
    clean = torch.cat([earlier | same, torch.zeros_like(same)], dim=-1)
    noised = torch.cat([earlier, same], dim=-1)
    return torch.cat([clean, noised], dim=1)
