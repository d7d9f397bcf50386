"""The contract of networks that predict masked tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from dllm_rl.types import BlockOrigin


class Cache(Protocol):
    """Keys and values of committed tokens, one entry per row. Engines call keep_rows() alone, a denoiser the rest.

    Exact: what update() returns for a committed entry is what was committed, since log-probabilities count as the
    learner's own. Made by ``CacheType(num_layers, valid)``, valid (N, 0) bool on the network's device.

    Attributes:
        valid: (N, S) bool; entries that every later position of the row may attend to.
    """

    valid: Tensor

    def update(self, key: Tensor, value: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Committed entries followed by a window's, (N, H, S + W, head width) each; the window is not committed yet."""

    def commit(self, valid: Tensor) -> None:
        """Keep the window that update() was given last; valid (N, W) bool marks its tokens."""

    def keep_rows(self, rows: Tensor) -> None:
        """Keep only these rows (int64 indices), in this order."""


CacheType = Callable[[int, Tensor], Cache]


@runtime_checkable
class Denoiser(Protocol):
    """A network that predicts masked tokens.

    Output position i always predicts token i (families that predict the next position are shifted inside).

    Attributes:
        mask_id: id of the absorbing mask token; never a sampled token.
        eos_id: the end token that a demonstration gets, and that positions hold which were never decoded.
        end_ids: all tokens that end a completion, eos_id among them.
        pad_id: id for padding.
        vocab_size: number of logits.
        max_length: longest sequence, tokens.
        block_size: None for full attention, else tokens per block of a block-causal family.
        block_origin: where blocks start for a block-causal family: "response" or "sequence".
        shift: True if the network itself predicts position i at i - 1 (then position 0 can never be masked).
        device: where tensors must live.
        module: the torch module whose parameters are trained.
    """

    mask_id: int
    eos_id: int
    end_ids: tuple[int, ...]
    pad_id: int
    vocab_size: int
    max_length: int
    block_size: int | None
    block_origin: BlockOrigin
    shift: bool
    module: nn.Module

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""

    def hidden_states(self, tokens: Tensor, mask: Tensor, valid: Tensor, block_ids: Tensor | None = None) -> Tensor:
        """Final hidden states whose unembedding predicts each position.

        Args:
            tokens: (N, L) int64, rows padded on the right.
            mask: (N, L) bool, True where the token is masked (replaced by the mask token).
            valid: (N, L) bool, False on padding; padding is never attended to.
            block_ids: (N, L) int64 block number of each position (see diffusion.layout), required by block-causal
                families and None for full attention. The forward is then over [clean | noised]: a noised position of
                block b sees clean blocks < b and noised block b; a clean position of block b sees clean blocks <= b.
        Returns:
            (N, L, D) in the dtype of the network; values on padding are meaningless.
        """

    def unembed(self, rows: Tensor) -> Tensor:
        """Logits (M, V) of hidden states (M, D): float32, or float64 if the network computes in float64."""

    def prefill(self, tokens: Tensor, valid: Tensor, block_ids: Tensor, cache_type: CacheType = ...) -> Cache:
        """Keys and values of clean (N, P) right-padded prompts under block-causal attention. Block families only."""

    def extend(self, cache: Cache, tokens: Tensor, positions: Tensor, valid: Tensor, *, commit: bool) -> Tensor:
        """Hidden states (N, W, D) of one window per row that sees the cache and the whole window. Block families only.

        Args:
            cache: what the rows have committed so far; every valid entry is visible to every window position.
            tokens: (N, W) int64 with the mask token at masked positions.
            positions: (N, W) int64 absolute positions.
            valid: (N, W) bool; invalid window positions are not attended to.
            commit: append the window's keys and values to the cache (clean tokens) or leave the cache as it was.
        """
