"""Which tokens a sequence-level likelihood sums over, and what it is divided by."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from dllm_rl.config.plugins import build
from dllm_rl.conformance import cases
from dllm_rl.seeding import generator_for

CANVAS = 8
LENGTH = torch.tensor([8, 5, 8, 8, 8, 3])  # of the case's completions


def gradient(name: str, options: dict):
    """Derivatives of minus the loss by the tokens' log-likelihoods at the old policy, (N, L), and the batch."""
    algorithm = build("algorithms", name, {"beta": 0.0, **options})
    batch, scored = cases.batch(block_causal=False), cases.rewards(cases.MIXED)
    masks = algorithm.masks(batch, generator_for(0))
    old = cases.estimate(batch, masks, algorithm.needs, seed=1)
    weight = algorithm.advantages(scored, batch)
    experience = cases.experience(batch, scored, weight, masks, old, None)
    leaf = old.token_logp.clone().requires_grad_()
    loss = algorithm.loss(dataclasses.replace(old, token_logp=leaf), experience).value
    return -torch.autograd.grad(loss, leaf)[0], batch, weight.double(), masks


@pytest.mark.parametrize("name", ["espo", "gdpo"])
@pytest.mark.parametrize(
    ("options", "scope", "divisor"),
    [
        ({}, "completion", LENGTH),
        ({"scope": "canvas", "norm": "canvas"}, "canvas", torch.full((6,), CANVAS)),
        ({"norm": "canvas"}, "completion", torch.full((6,), CANVAS)),
        ({"norm": "none"}, "completion", torch.ones(6)),
        ({"paper_exact": True}, "canvas", torch.full((6,), CANVAS)),
    ],
)
def test_every_scored_token_gets_the_advantage_over_the_divisor(name, options, scope, divisor):
    got, batch, weight, masks = gradient(name, options)
    where = batch.completion | batch.tail if scope == "canvas" else batch.completion
    want = torch.where(where, (weight / divisor / 6)[:, None], 0.0)
    torch.testing.assert_close(got, want, atol=1e-10, rtol=0)
    drawn = (masks.weight != 0).any(0)
    assert bool((drawn <= where).all()) and (name == "gdpo" or torch.equal(drawn, where))
    assert bool(masks.mask[:, batch.tail & ~where].all()), "what is not scored after the end is not shown"


@pytest.mark.parametrize(("options", "scope"), [({}, "completion"), ({"scope": "canvas"}, "canvas")])
def test_igpo_trains_on_the_completion_or_on_the_canvas(options, scope):
    got, batch, weight, _ = gradient("igpo", options)
    where = batch.completion | batch.tail if scope == "canvas" else batch.completion
    want = torch.where(where, (weight / where.sum())[:, None], 0.0)  # the ratio of a row is in each of its terms
    torch.testing.assert_close(got, want, atol=1e-10, rtol=0)


def test_as_released_what_follows_the_end_is_masked_at_the_rate_of_the_view():
    """coupled-GRPO: in one of two views, and in the full one; it is never scored."""
    algorithm = build("algorithms", "coupled_grpo", {"paper_exact": True})
    batch = cases.batch(block_causal=False)
    masks = algorithm.masks(batch, generator_for(0))
    first, second, full = masks.mask[:, batch.tail]
    assert torch.equal(second, ~first) and first.any() and second.any() and full.all()
    assert not masks.weight[:, batch.tail].any()
