"""SPG's bounds, by enumeration of every draw of a tiny completion, and its loss by loops over rows and draws."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch

from algorithms.spg import power_mean
from dllm_rl.conformance import cases
from dllm_rl.conformance.algorithms import Subject
from dllm_rl.diffusion.layout import block_index
from dllm_rl.seeding import generator_for

LENGTH = 3


def table(seed):
    """p(token i | the set that is masked with it), at random: what a network says about one completion."""
    draw = torch.rand(LENGTH, 2**LENGTH, generator=generator_for(seed, "spg"), dtype=torch.float64)
    return lambda i, hidden: float(draw[i, sum(2**j for j in hidden)]) * 0.9 + 0.05


def every_draw(blocks, p):
    """(probability times weight, log p) of each draw that masking.blockwise_count can make, (K, 1, 3) both."""
    weights, logps = [], []
    for number, block in enumerate(blocks):
        later = {i: j for j, other in enumerate(blocks) if j > number for i in other}
        for n in range(1, len(block) + 1):
            for noised in itertools.combinations(block, n):
                chance = 1 / len(blocks) / len(block) / math.comb(len(block), n)
                weight = {i: len(block) / n / (number + 1) for i in noised} | {i: 1 / (j + 1) for i, j in later.items()}
                hidden = set(weight)
                weights.append([chance * len(blocks) * weight.get(i, 0.0) for i in range(LENGTH)])
                logps.append([math.log(p(i, hidden)) if i in hidden else 0.0 for i in range(LENGTH)])
    return (torch.tensor(values, dtype=torch.float64)[:, None] for values in (weights, logps))


@pytest.mark.parametrize("blocks", [[(0, 1, 2)], [(0, 1), (2,)], [(0,), (1,), (2,)]], ids=str)
def test_the_bounds_enclose_the_likelihood(blocks):
    """Over all draws. With one block the likelihood is that of decoding token by token in a uniformly random order, and
    the upper bound holds by Hoelder's inequality if beta is at least the length.
    """
    for seed in range(50):
        p = table(seed)
        weight, logp = every_draw(blocks, p)
        torch.testing.assert_close(weight.sum(0), torch.ones(1, LENGTH, dtype=torch.float64))
        lower = (weight * logp).sum().item()
        uppers = [power_mean(logp, weight, beta).sum().item() for beta in (1, 1.5, 2, LENGTH)]
        assert all(a < b for a, b in itertools.pairwise([lower, *uppers])), "nearer to 1 is tighter"
        if len(blocks) == 1:
            orders = list(itertools.permutations(range(LENGTH)))
            chances = [math.prod(p(i, set(order[k:])) for k, i in enumerate(order)) for order in orders]
            assert lower <= math.log(sum(chances) / len(orders)) <= uppers[-1]


def test_power_mean_by_hand_with_its_gradient():
    """Token 0: two draws of weights 1 and 3; token 1: one draw; token 2: none. d/d log p_k = the draw's share of the
    sum of w p^beta.
    """
    p = torch.tensor([[[0.5, 0.2, 1.0]], [[0.1, 1.0, 1.0]]], dtype=torch.float64)
    weight = torch.tensor([[[1.0, 4.0, 0.0]], [[3.0, 0.0, 0.0]]], dtype=torch.float64)
    logp = p.log().requires_grad_()
    mean = power_mean(logp, weight, 2.0)
    torch.testing.assert_close(mean[0], torch.tensor([math.log(0.07) / 2, math.log(0.2), 0.0], dtype=torch.float64))
    slope = torch.autograd.grad(mean.sum(), logp)[0]
    torch.testing.assert_close(slope[:, 0, 0], torch.tensor([0.25 / 0.28, 0.03 / 0.28], dtype=torch.float64))
    assert slope[:, 0, 1:].tolist() == [[1.0, 0.0], [0.0, 0.0]]


def by_loops(experience, logp, *, beta, mixture, released):
    """The loss, one row, draw and token at a time; of the released form without the constant log(t)/beta."""
    masks, batch, total = experience.masks, experience.batch, logp.new_zeros(())
    for row in range(len(batch)):
        value, where = experience.advantage[row].double(), batch.completion[row].nonzero().flatten().tolist()
        lower = upper = logp.new_zeros(())
        scored = {k: [i for i in where if masks.weight[k, row, i] > 0] for k in range(len(masks.mask))}
        covered = sorted({i for tokens in scored.values() for i in tokens})
        for k, tokens in scored.items():
            for i in tokens:
                weight = len(where) / len(tokens) / len(scored) if released else masks.weight[k, row, i].double()
                lower = lower + weight * logp[k, row, i]
        for i in covered:
            pairs = [(masks.weight[k, row, i].double(), logp[k, row, i]) for k in scored if i in scored[k]]
            whole = sum(w for w, _ in pairs)
            mean = (sum(w * one.exp() ** beta for w, one in pairs) / whole).log() / beta
            upper = upper + mean * (len(where) / len(covered) if released else whole)
        total = total - value * (lower if value >= 0 else (1 - mixture) * lower + mixture * upper)
    return total / experience.counts.num_tokens


@pytest.mark.parametrize("block_causal", [False, True])
@pytest.mark.parametrize("released", [False, True])
@pytest.mark.parametrize("mixture", [0.0, 0.5, 1.0])
def test_loss_and_gradient_by_loops(block_causal, released, mixture):
    options = {"block_size": 4, "mixture": mixture, "paper_exact": released, "context_mask_rate": 0.3}
    subject = Subject("spg", options)
    experience = subject.experience(subject.batch(block_causal))
    times = (experience.masks.weight > 0).sum(0)[experience.batch.completion]
    assert set(times.tolist()) == {0, 1, 2}, "tokens that no draw scores, one, and both"
    new = subject.estimate(experience.batch, experience.masks, seed=3)
    logp = new.draw_token_logp.clone().requires_grad_()
    expected = by_loops(experience, logp, beta=1.5, mixture=mixture, released=released)
    leaf = new.draw_token_logp.clone().requires_grad_()
    loss = subject.algorithm.loss(dataclasses.replace(new, draw_token_logp=leaf), experience)
    torch.testing.assert_close(loss.value, expected, rtol=1e-6, atol=1e-9)
    slopes = (torch.autograd.grad(value, at)[0] for value, at in ((loss.value, leaf), (expected, logp)))
    torch.testing.assert_close(*slopes, rtol=1e-6, atol=1e-9)
    assert loss.metrics["bound_gap"] > 0


def test_two_draws_of_different_blocks_meet_in_later_ones():
    """Else every token would have one draw, and the upper bound would be the lower one."""
    batch = cases.batch(block_causal=False).select(torch.tensor([0, 2, 3, 4]).repeat(200))  # two blocks of four
    times = (Subject("spg", {"block_size": 4}).masks(batch).weight > 0).sum(0)
    second = (block_index(batch.prompt_length, batch.tokens.shape[1], 4) == 1) & batch.completion
    assert times[second].min() == 1 and 0.5 < (times[second] == 2).double().mean() < 0.75, (
        "(1 + ... + 4)/4 of 4 = 0.625"
    )


def test_released_scores_are_of_all_that_is_masked():
    """Weight C/(K n) on each of the n masked tokens of a draw, perturbed tokens of earlier blocks among them."""
    subject = Subject("spg", {"block_size": 4, "paper_exact": True, "context_mask_rate": 0.3})
    batch = subject.batch(False)
    ours = Subject("spg", {"block_size": 4, "context_mask_rate": 0.3}).masks(batch)
    released = subject.masks(batch)
    assert torch.equal(released.mask, ours.mask)
    scored = released.mask & batch.completion
    share = batch.completion.sum(-1, keepdim=True) / scored.sum(-1, keepdim=True) / 2
    torch.testing.assert_close(released.weight, scored * share)
    assert (scored & (ours.weight == 0)).any(), "the forms differ"


def test_what_comes_before_the_block_is_masked_at_the_rate_and_never_scored():
    batch = cases.batch(block_causal=False).select(torch.arange(6).repeat(300))
    plain = Subject("spg", {"block_size": 4, "context_mask_rate": 0.0}).masks(batch)
    noised = Subject("spg", {"block_size": 4, "context_mask_rate": 0.25}).masks(batch)
    assert torch.equal(plain.weight, noised.weight)
    ids = block_index(batch.prompt_length, batch.tokens.shape[1], 4)
    before = ids < torch.where(plain.weight != 0, ids, 99).amin(-1, keepdim=True)
    assert (before & batch.completion).any(), "earlier blocks are context"
    added = noised.mask & ~plain.mask
    assert not (added & ~before).any() and not added[..., 0].any()
    number = int(before[..., 1:].sum())
    assert abs(int(added.sum()) / number - 0.25) < 4.5 * math.sqrt(0.25 * 0.75 / number)
