"""Reward functions of tests, without imports: reward workers load this module, and torch alone takes them seconds."""

from __future__ import annotations

import zlib


def plain(completion):
    """The text of a completion, which is a list of messages where the prompt is one."""
    return completion if isinstance(completion, str) else completion[-1]["content"]


def apart(prompts, completions, **columns):
    """A number in [0, 1] that tells different texts apart."""
    return [zlib.crc32(plain(text).encode()) % 101 / 100 for text in completions]


def share(prompts, completions, *, answer, **columns):
    """The share of characters that are right; 1 only if all are there and nothing else."""
    return [
        sum(a == b for a, b in zip(text, wanted, strict=False)) / max(len(text), len(wanted))
        for text, wanted in zip(completions, answer, strict=True)
    ]


def fails(prompts, completions, **columns):
    """A verifier that is down."""
    raise OSError("no connection")


def right(prompts, completions, **columns):
    """Everything is right."""
    return [1.0] * len(completions)


def equal(prompts, completions, answer, **columns):
    """1 if the completion is the answer."""
    return [float(a == c) for a, c in zip(answer, completions, strict=True)]


def apart_for_some(prompts, completions, **columns):
    """What tells texts apart, for about half of the prompts; the others' completions are all worth the same."""
    some = [zlib.crc32(str(prompt).encode()) % 2 == 0 for prompt in prompts]
    return [value if kept else 0.3 for value, kept in zip(apart(prompts, completions), some, strict=True)]


def half(prompts, completions, **columns):
    """1 for about half of the texts, else 0."""
    return [float(zlib.crc32(plain(text).encode()) % 2) for text in completions]
