"""Keys and values of committed tokens for block-causal decoding."""

from __future__ import annotations

import torch
from torch import Tensor


class BlockCache:
    """Grows by one window at a time; rows with ragged prompts share one rectangle through a validity mask.

    Keeps protocols.denoiser.Cache. Passed to transformers' attention as ``past_key_values``: of that interface
    attention only calls ``update``. Windows are written behind the committed entries into spare room, so a denoising
    forward copies W entries, not the whole cache, and committing is a change of length.

    Attributes:
        valid: (N, S) bool; entries that every later position of the row may attend to.
    """

    def __init__(self, num_layers: int, valid: Tensor) -> None:
        """Make an empty cache.

        Args:
            num_layers: layers of the network.
            valid: (N, 0) bool, on the device of the network.
        """
        self.valid = valid
        self._keys: list[Tensor | None] = [None] * num_layers
        self._values: list[Tensor | None] = [None] * num_layers

    def __len__(self) -> int:
        return self.valid.shape[1]

    def update(self, key: Tensor, value: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Committed entries followed by a window's, (N, H, S + W, head width) each; the window is not committed yet."""
        return self._write(self._keys, layer, key), self._write(self._values, layer, value)

    def commit(self, valid: Tensor) -> None:
        """Keep the window that was written last; valid (N, W) bool marks its tokens."""
        self.valid = torch.cat([self.valid, valid], dim=1)

    def keep_rows(self, rows: Tensor) -> None:
        """Keep only these rows (int64 indices), in this order."""
        rows = rows.to(self.valid.device)
        self.valid = self.valid[rows]
        for store in (self._keys, self._values):
            store[:] = [None if entries is None else entries[rows] for entries in store]

    def _write(self, store: list[Tensor | None], layer: int, window: Tensor) -> Tensor:
        start, end = len(self), len(self) + window.shape[2]
        room = store[layer]
        if room is None or room.shape[2] < end:
            num_rows, num_heads, width, head = window.shape
            grown = window.new_empty(num_rows, num_heads, max(end, 2 * start) + 2 * width, head)
            if room is not None:
                grown[:, :, :start] = room[:, :, :start]
            store[layer] = room = grown
        room[:, :, start:end] = window
        return room[:, :, :end]
