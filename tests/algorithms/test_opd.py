"""On-policy distillation: its gradient is that of the reverse divergence, and what the teacher sees."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from dllm_rl.conformance import cases
from dllm_rl.conformance.algorithms import Subject
from dllm_rl.protocols.algorithm import Plan
from dllm_rl.seeding import generator_for
from dllm_rl.types import LikelihoodEstimate, Sampling

NAME = "algorithms.opd:OPD"
BLOCKS = pytest.mark.parametrize("block_causal", [False, True])


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_sum"])
def test_gradient_at_the_old_policy(reduction):
    """d loss / d l_i = -(log q_i - l_old_i + w A) / T with T all tokens, or / N rows."""
    subject = Subject(NAME, {"reduction": reduction, "reward_weight": 0.5})
    for (batch,) in subject.cases():
        seen = subject.experience(batch)
        _, gradient = subject.gradient(seen, seen.old)
        centred = seen.rewards.total - seen.rewards.total.view(2, 3).mean(1).repeat_interleave(3)
        credit = seen.reference.token_logp - seen.old.token_logp + 0.5 * centred[:, None].double()
        count = batch.completion.sum() if reduction == "token_mean" else len(batch)
        torch.testing.assert_close(gradient, torch.where(batch.completion, -credit / count, 0.0), rtol=1e-6, atol=1e-9)


def test_the_mean_over_what_the_model_says_is_the_gradient_of_the_reverse_divergence():
    """One position, five tokens, all of them enumerated: sum_v p_v dloss_v = d KL(p || q), in float64."""
    subject, size = Subject(NAME, {}), 5
    batch = cases.batch(block_causal=False).select(torch.tensor([0]))
    place = batch.completion[0].nonzero()[2].item()
    batch = dataclasses.replace(batch, completion=torch.arange(batch.tokens.shape[1])[None] == place)
    logits = torch.randn(size, dtype=torch.float64, generator=generator_for(0)).requires_grad_()
    teacher = torch.randn(size, dtype=torch.float64, generator=generator_for(1)).log_softmax(0)
    logp = logits.log_softmax(0)
    (want,) = torch.autograd.grad((logp.exp() * (logp - teacher)).sum(), logits, retain_graph=True)

    def said(value):
        token = torch.zeros(batch.tokens.shape, dtype=torch.float64)
        token[0, place] = value
        return LikelihoodEstimate(token_logp=token)

    surrogate = torch.zeros((), dtype=torch.float64)
    for token in range(size):
        old = said(logp[token].detach())
        masks = subject.masks(batch)
        seen = cases.experience(batch, cases.rewards([1.0]), torch.zeros(1), masks, old, said(teacher[token]))
        _, gradient = subject.gradient(seen, old)
        surrogate = surrogate + logp[token].detach().exp() * gradient[0, place] * logp[token]
    (got,) = torch.autograd.grad(surrogate, logits)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


@BLOCKS
def test_the_teacher_sees_a_share_of_what_comes_later_and_never_what_it_scores(block_causal):
    subject = Subject(NAME, {"retain": 0.4})
    batch = subject.batch(block_causal)
    rows = batch.select(torch.arange(len(batch)).repeat(100))
    masks = subject.masks(rows)
    seen = subject.algorithm.reference_masks(rows, masks, generator_for(0))
    again = subject.algorithm.reference_masks(rows, masks, generator_for(0))
    assert torch.equal(seen.mask, again.mask) and torch.equal(seen.weight, masks.weight)
    shown = masks.mask & ~seen.mask
    assert not (seen.mask & ~masks.mask).any() and not (shown & (masks.weight != 0)).any()
    assert not (shown & ~rows.completion).any(), "what follows the end tells how long the answer is"
    later = masks.mask & rows.completion & (masks.weight == 0)
    assert 0.38 < shown.sum() / later.sum() < 0.42
    blind = Subject(NAME, {}).algorithm
    assert blind.reference_masks(rows, masks, generator_for(0)) is masks


def test_a_gap_is_cut():
    subject = Subject(NAME, {"max_gap": 0.25})
    (batch,), *_ = subject.cases()
    seen = subject.experience(batch)
    _, gradient = subject.gradient(seen, seen.old)
    gap = seen.reference.token_logp - seen.old.token_logp
    assert (gap[batch.completion].abs() > 0.25).any() and (gap[batch.completion].abs() < 0.25).any()
    want = torch.where(batch.completion, -gap.clamp(-0.25, 0.25) / batch.completion.sum(), 0.0)
    torch.testing.assert_close(gradient, want, rtol=1e-6, atol=1e-12)


def test_rows_below_the_least_reward_are_left_out():
    batch = cases.batch(block_causal=False)
    scored = cases.rewards(cases.MIXED, excluded=4)
    assert (
        Subject(NAME, {"min_reward": 0.5}).algorithm.keep(scored, batch).tolist() == [True, False, True] + [False] * 3
    )
    assert Subject(NAME, {}).algorithm.keep(scored, batch).tolist() == [True] * 4 + [False, True]


def test_a_plan_without_a_teacher_or_without_samples_is_refused():
    def check(options, *, teacher, temperature=1.0):
        sampling = Sampling(max_new_tokens=4, temperature=temperature)
        plan = Plan(sampling=sampling, strategy="x", has_policy=False, examples=(), task="t", teacher=teacher)
        Subject(NAME, options).algorithm.check_plan(plan)

    check({}, teacher=True)
    check({"retain": 0.25}, teacher=False)
    with pytest.raises(ValueError, match=r"algorithm 'opd' has no teacher: set model\.teacher"):
        check({}, teacher=False)
    with pytest.raises(ValueError, match="greedy tokens are none"):
        check({}, teacher=True, temperature=0.0)


def test_only_rewards_need_groups():
    assert Subject(NAME, {}).needs.group_size == 1 and Subject(NAME, {"reward_weight": 1.0}).needs.group_size == 2
