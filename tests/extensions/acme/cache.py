"""A key-value cache for block-causal decoding: one tensor per committed window."""

from __future__ import annotations

import torch


class WindowCache:
    """Joins the windows at every call, and holds no spare room."""

    commits = 0  # of this process, for the test

    def __init__(self, num_layers, valid):
        self.valid = valid
        self._windows = [[] for _ in range(num_layers)]
        self._written = {}

    def update(self, key, value, layer):
        self._written[layer] = (key, value)
        keys, values = zip(*self._windows[layer], (key, value), strict=True)
        return torch.cat(keys, dim=2), torch.cat(values, dim=2)

    def commit(self, valid):
        WindowCache.commits += 1
        self.valid = torch.cat([self.valid, valid], dim=1)
        for layer, windows in enumerate(self._windows):
            windows.append(self._written[layer])

    def keep_rows(self, rows):
        self.valid = self.valid[rows]
        self._windows = [[(key[rows], value[rows]) for key, value in windows] for windows in self._windows]
