"""Reward functions of tests, without imports: reward workers load this module, and torch alone takes them seconds."""

from __future__ import annotations

import zlib


def apart(prompts, completions, **columns):
    """A number in [0, 1] that tells different texts apart."""
    return [zlib.crc32(text.encode()) % 101 / 100 for text in completions]


def share(prompts, completions, *, answer, **columns):
    """The share of characters that are right; 1 only if all are there and nothing else."""
    return [
        sum(a == b for a, b in zip(text, wanted, strict=False)) / max(len(text), len(wanted))
        for text, wanted in zip(completions, answer, strict=True)
    ]


def fails(prompts, completions, **columns):
    """A verifier that is down."""
    raise OSError("no connection")


def equal(prompts, completions, answer, **columns):
    """1 if the completion is the answer."""
    return [float(a == c) for a, c in zip(answer, completions, strict=True)]
