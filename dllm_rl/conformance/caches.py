"""What every cache of keys and values must keep to; see dllm_rl.protocols.denoiser."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dllm_rl.config.plugins import plugin_class
from dllm_rl.conformance import cases, engines
from dllm_rl.conformance.violation import no_options, require
from dllm_rl.seeding import generator_for

LAYERS, ROWS, HEADS, WIDTH = 2, 3, 2, 4


class Subject:
    """A cache class, and the native engine that decodes with it."""

    def __init__(self, name: str, options: Mapping[str, Any]) -> None:
        no_options("caches", name, options)
        self.kind = plugin_class("caches", name)
        self.engine = engines.Subject("native", {"cache": name})

    def close(self) -> None:
        """Remove the engine's models."""
        self.engine.close()


def _window(number: int, layer: int, rows: int) -> tuple[Tensor, Tensor]:
    drawn = torch.randn(2, rows, HEADS, cases.BLOCK, WIDTH, generator=generator_for(number, "conformance", layer))
    return drawn[0], drawn[1]


def committed_entries_come_back(subject: Subject) -> None:
    """update() gives what was committed, then the window; a window that is not committed leaves nothing behind."""
    cache, order = subject.kind(LAYERS, torch.ones(ROWS, 0, dtype=torch.bool)), torch.arange(ROWS)
    want = [(torch.zeros(ROWS, HEADS, 0, WIDTH),) * 2 for _ in range(LAYERS)]
    valid = torch.ones(ROWS, 0, dtype=torch.bool)
    for number in range(6):
        here = torch.rand(len(order), cases.BLOCK, generator=generator_for(number, "conformance", "valid")) < 0.9
        for layer in range(LAYERS):
            window = _window(number, layer, len(order))
            whole = [torch.cat([old, new], dim=2) for old, new in zip(want[layer], window, strict=True)]
            got = cache.update(*window, layer)
            same = all(torch.equal(a, b) for a, b in zip(got, whole, strict=True))
            require(same, f"window {number}, layer {layer}: other keys or values than were committed and given")
            want[layer] = (whole[0], whole[1]) if number % 2 else want[layer]
        if number % 2:
            cache.commit(here)
            valid = torch.cat([valid, here], dim=1)
        if number == 3:  # a row leaves, the others change places
            order = torch.tensor([2, 0])
            cache.keep_rows(order)
            want, valid = [(key[order], value[order]) for key, value in want], valid[order]
        require(torch.equal(cache.valid, valid), f"window {number}: valid is {cache.valid.tolist()}")


def decoding_with_it_is_exact(subject: Subject) -> None:
    """The native engine decodes with it what the reference engine decodes without a cache."""
    for family, denoiser in subject.engine.cases():
        if denoiser.block_size is not None:
            engines.it_decodes_what_the_oracle_decodes(subject.engine, family, denoiser)
