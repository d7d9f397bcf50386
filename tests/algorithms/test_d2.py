"""d2: between the one-step likelihood and the trajectory's own, and its gradient."""

from __future__ import annotations

import pytest
import torch

from dllm_rl.config.plugins import build
from dllm_rl.conformance.algorithms import Subject
from dllm_rl.seeding import generator_for

NAME = "algorithms.d2:D2"


def masks(name, block_causal, **options):
    subject = Subject(name, options)
    batch = subject.batch(block_causal)
    return batch, subject.algorithm.masks(batch, generator_for(0))


@pytest.mark.parametrize("block_causal", [False, True])
def test_as_many_segments_as_forwards_are_the_trajectory_and_one_is_the_full_mask(block_causal):
    batch, most = masks(NAME, block_causal, segments=4)
    _, exact = masks("trace_rl", block_causal)
    assert torch.equal(most.mask, exact.mask) and torch.equal(most.weight, exact.weight)
    _, one = masks(NAME, block_causal, segments=1)
    canvas = batch.completion if block_causal else batch.completion | batch.tail  # a later block is out of sight anyway
    assert len(one.mask) == 1 and one.mask[0][canvas].all()
    assert torch.equal(one.weight, batch.completion[None].float())
    _, some = masks(NAME, False, segments=2)
    assert len(one.mask) < len(some.mask) < len(masks("trace_rl", False)[1].mask)


def test_a_prompt_is_masked_alike_in_all_states_and_never_scored():
    batch, plain = masks(NAME, False)
    _, hidden = masks(NAME, False, prompt_mask_rate=0.5)
    prompt = batch.valid & ~batch.completion & ~batch.tail
    assert torch.equal(hidden.mask[:, ~prompt], plain.mask[:, ~prompt]) and torch.equal(hidden.weight, plain.weight)
    assert (hidden.mask == hidden.mask[:1])[:, prompt].all(), "one set for all states of an update"
    shown = hidden.mask[0][prompt]
    assert 0 < shown.sum() < len(shown) and not hidden.mask[:, :, 0].any()


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_sum"])
def test_gradient_at_the_old_policy(reduction):
    """d loss / d l_i = - A / T with T all scored tokens, or - A / N rows."""
    subject = Subject(NAME, {"segments": 3, "beta": 0.0, "reduction": reduction})
    for (batch,) in subject.cases():
        seen = subject.experience(batch)
        _, gradient = subject.gradient(seen, seen.old)
        count = batch.completion.sum() if reduction == "token_mean" else len(batch)
        want = torch.where(batch.completion, -seen.advantage[:, None].double() / count, 0.0)
        torch.testing.assert_close(gradient, want, rtol=1e-6, atol=1e-12)


def test_one_segment_reads_no_trajectory():
    assert (
        build("algorithms", NAME, {}).needs.trajectory
        and not build("algorithms", NAME, {"segments": 1}).needs.trajectory
    )
