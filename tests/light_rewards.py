"""Reward functions of tests, without imports: reward workers load this module, and torch alone takes them seconds."""

from __future__ import annotations


def low(prompts, completions, **columns):
    """The share of 1 and 2."""
    return [sum(c in "12" for c in text) / max(1, len(text)) for text in completions]


def share(prompts, completions, *, answer, **columns):
    """The share of characters that are right; 1 only if all are there and nothing else."""
    return [
        sum(a == b for a, b in zip(text, wanted, strict=False)) / max(len(text), len(wanted))
        for text, wanted in zip(completions, answer, strict=True)
    ]


def fails(prompts, completions, **columns):
    """A verifier that is down."""
    raise OSError("no connection")
