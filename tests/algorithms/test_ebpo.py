"""EBPO: a sequence's ratio is the mean over draws of the sum over blocks of their ELBOs."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from dllm_rl.conformance import cases
from dllm_rl.conformance.algorithms import Subject
from dllm_rl.protocols.algorithm import Needs

NAME = "algorithms.ebpo:EBPO"


def composite(batch, masks, logp, row):
    """B of a row, by the equation: one term for every draw, block and hidden token."""
    blocks = torch.zeros_like(batch.tokens) if batch.block_ids is None else batch.block_ids
    total, number = 0.0, len(masks.mask)
    for k in range(number):
        for block in blocks[row][batch.completion[row]].unique().tolist():
            inside = batch.completion[row] & (blocks[row] == block)
            hidden = inside & masks.mask[k, row]
            assert hidden.any(), "every block has a term in every draw"
            total += float(inside.sum() / hidden.sum() * logp[k, row][hidden].sum()) / number
    return total


@pytest.mark.parametrize("block_causal", [False, True])
def test_the_loss_by_hand(block_causal):
    subject = Subject(NAME, {"draws": 3, "epsilon": 0.5})
    seen = subject.experience(subject.batch(block_causal))
    old, new = (cases.estimate(seen.batch, seen.masks, Needs(draws=True), seed=seed) for seed in (5, 6))
    want = 0.0
    ratios = []
    for row, a in enumerate(seen.advantage.tolist()):
        r = math.exp(
            composite(seen.batch, seen.masks, new.draw_token_logp, row)
            - composite(seen.batch, seen.masks, old.draw_token_logp, row)
        )
        want -= min(r * a, min(max(r, 0.5), 1.5) * a) / len(seen.batch)
        ratios.append(r)
    assert min(ratios) < 0.5 and max(ratios) > 1.5, "both bounds are tried"
    got = subject.algorithm.loss(new, dataclasses.replace(seen, old=old))
    assert float(got.value) == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize(("norm", "share"), [("none", 1.0), ("length", None)])
def test_gradient_at_the_old_policy(norm, share):
    """d loss / d l_i = - A / N for every token of a row, or - A / (C N) with length-normalised ratios."""
    subject = Subject(NAME, {"draws": 2, "ratio_norm": norm})
    for (batch,) in subject.cases():
        seen = subject.experience(batch)
        _, gradient = subject.gradient(seen, seen.old)
        length = batch.completion.sum(-1, keepdim=True).double() if share is None else share
        want = torch.where(batch.completion, -seen.advantage[:, None].double() / length / len(batch), 0.0)
        torch.testing.assert_close(gradient, want, rtol=1e-6, atol=1e-12)
