"""Exact laws of the choice of positions: probabilities sum to 1, and sampling follows them."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from dllm_rl.seeding import generator_for
from rollouts import choices

WIDTH = 4
UTILITY = torch.tensor([0.3, -1.2, 0.9, -0.1], dtype=torch.float64)
LAWS = {
    "bernoulli": (choices.draw_bernoulli, choices.bernoulli_logp),
    "plackett_luce": (choices.draw_plackett_luce, choices.plackett_luce_logp),
}
DRAWS = 60_000


def outcomes(name, allowed):
    """(M, W) int64: every order that can come out."""
    places = [i for i in range(WIDTH) if allowed[i]]
    found = []
    for size in range(1, len(places) + 1):
        picks = itertools.combinations if name == "bernoulli" else itertools.permutations
        for pick in picks(places, size):
            order = torch.zeros(WIDTH, dtype=torch.int64)
            order[list(pick)] = torch.arange(1, size + 1)
            found.append(order)
    return torch.stack(found)


def masks():
    return [
        torch.tensor(bits, dtype=torch.bool) for bits in itertools.product((False, True), repeat=WIDTH) if any(bits)
    ]


@pytest.mark.parametrize("name", LAWS)
@pytest.mark.parametrize("allowed", masks(), ids=str)
def test_probabilities_sum_to_one(name, allowed):
    orders = outcomes(name, allowed)
    shape = orders.shape
    logp = LAWS[name][1](UTILITY.expand(shape), allowed.expand(shape), orders)
    assert logp.exp().sum().item() == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("name", LAWS)
@pytest.mark.parametrize("allowed", [torch.tensor([1, 1, 1, 1]).bool(), torch.tensor([1, 0, 1, 1]).bool()], ids=str)
def test_samples_follow_the_law(name, allowed):
    draw, logp = LAWS[name]
    noise = torch.rand(DRAWS, WIDTH, generator=generator_for(0, name), dtype=torch.float64).clamp(1e-12, 1 - 1e-12)
    drawn = draw(UTILITY.expand(DRAWS, WIDTH), allowed.expand(DRAWS, WIDTH), noise)
    orders = outcomes(name, allowed)
    probability = logp(UTILITY.expand(orders.shape), allowed.expand(orders.shape), orders).exp()
    count = (drawn[:, None] == orders[None]).all(-1).sum(0)
    assert int(count.sum()) == DRAWS, "an impossible outcome was drawn"
    error = (count / DRAWS - probability).abs() / (probability * (1 - probability) / DRAWS).sqrt()
    assert float(error.max()) < 4.5, error


def test_bernoulli_by_hand():
    """Positions of probability 1/2 and 1/4; the guard takes the first."""
    utility = torch.tensor([[0.0, -math.log(3)]], dtype=torch.float64)
    allowed = torch.ones(1, 2, dtype=torch.bool)
    for order, probability in (([1, 0], 3 / 8 + 3 / 8), ([0, 1], 1 / 8), ([1, 2], 1 / 8)):
        logp = choices.bernoulli_logp(utility, allowed, torch.tensor([order]))
        assert logp.exp().item() == pytest.approx(probability)


def test_the_guard_takes_no_notice_of_rounding_errors():
    """Scoring sees the utilities of sampling only up to a last bit; equal positions stay a tie, which goes left."""
    sampled, scored = torch.tensor([[-2.0, -2.0 + 1e-6]]), torch.tensor([[-2.0 + 1e-6, -2.0]])
    allowed, noise = torch.ones(1, 2, dtype=torch.bool), torch.full((1, 2), 0.999, dtype=torch.float64)
    order = choices.draw_bernoulli(sampled, allowed, noise)
    assert order.tolist() == [[1, 0]]
    before, after = (choices.bernoulli_logp(utility, allowed, order).item() for utility in (sampled, scored))
    assert after == pytest.approx(before, abs=1e-5)


def test_plackett_luce_by_hand():
    """Weights 1 and 3, STOP 1: first among positions alone, then against STOP; a last position leaves STOP certain."""
    utility = torch.tensor([[0.0, math.log(3)]], dtype=torch.float64)
    allowed = torch.ones(1, 2, dtype=torch.bool)
    for order, probability in (([1, 0], 1 / 4 * 1 / 4), ([1, 2], 1 / 4 * 3 / 4), ([2, 1], 3 / 4 / 2), ([0, 1], 3 / 8)):
        logp = choices.plackett_luce_logp(utility, allowed, torch.tensor([order]))
        assert logp.exp().item() == pytest.approx(probability)


@pytest.mark.parametrize("name", LAWS)
def test_gradients_are_finite_and_sum_to_zero_in_expectation(name):
    """E grad log p = 0: the score function of a normalised law."""
    allowed = torch.tensor([True, False, True, True])
    orders = outcomes(name, allowed)
    utility = UTILITY.clone().requires_grad_()
    logp = LAWS[name][1](utility.expand(orders.shape), allowed.expand(orders.shape), orders)
    (gradient,) = torch.autograd.grad((logp.detach().exp() * logp).sum(), utility)
    torch.testing.assert_close(gradient, torch.zeros(WIDTH, dtype=torch.float64), atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", LAWS)
def test_rows_that_may_choose_nothing_choose_nothing(name):
    draw, logp = LAWS[name]
    allowed = torch.zeros(2, WIDTH, dtype=torch.bool)
    allowed[1, 2] = True
    utility = UTILITY.expand(2, WIDTH).clone().requires_grad_()
    order = draw(utility, allowed, torch.full((2, WIDTH), 0.5, dtype=torch.float64))
    assert order.tolist() == [[0, 0, 0, 0], [0, 0, 1, 0]]
    value = logp(utility, allowed, order)
    assert value.tolist() == [0.0, 0.0]  # nothing to choose; one position: certain
    value.sum().backward()
    assert bool(torch.isfinite(utility.grad).all())


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_ranking_has_the_law_of_plackett_and_luce(count):
    """By hand: u_k - log of the sum over those left; its draws follow it, and its gradient is finite."""
    allowed = torch.tensor([True, True, False, True] if count < 3 else [True] * WIDTH)
    orders = torch.stack([o for o in outcomes("plackett_luce", allowed) if int((o > 0).sum()) == count])
    utility = UTILITY.expand(orders.shape).clone().requires_grad_()
    logp = choices.ranking_logp(utility, allowed.expand(orders.shape), orders)
    for order, found in zip(orders, logp.tolist(), strict=True):
        left, want = set(allowed.nonzero().flatten().tolist()), 0.0
        for k in range(1, count + 1):
            place = (order == k).nonzero().item()
            want += UTILITY[place].item() - math.log(sum(math.exp(UTILITY[j]) for j in left))
            left.remove(place)
        assert found == pytest.approx(want)
    assert logp.exp().sum().item() == pytest.approx(1.0, abs=1e-12)
    (slope,) = torch.autograd.grad(logp.sum(), utility)
    assert torch.isfinite(slope).all() and not slope[:, ~allowed].any()
    noise = torch.rand(DRAWS, WIDTH, generator=generator_for(0, count), dtype=torch.float64).clamp(1e-12, 1 - 1e-12)
    drawn = choices.draw_ranking(
        UTILITY.expand(DRAWS, WIDTH), allowed.expand(DRAWS, WIDTH), noise, torch.full((DRAWS,), count)
    )
    found = (drawn[:, None] == orders[None]).all(-1).sum(0)
    assert int(found.sum()) == DRAWS, "an impossible outcome was drawn"
    probability = logp.detach().exp()
    error = (found / DRAWS - probability).abs() / (probability * (1 - probability) / DRAWS).sqrt()
    assert float(error.max()) < 4.5, error


def test_a_ranking_of_everything_decides_nothing():
    allowed = torch.tensor([[True, False, True, True], [False] * WIDTH])
    noise = torch.rand(2, WIDTH, generator=generator_for(1), dtype=torch.float64)
    order = choices.draw_ranking(UTILITY.expand(2, WIDTH), allowed, noise, torch.tensor([9, 1]))
    assert sorted(order[0].tolist()) == [0, 1, 2, 3] and order[0, 1] == 0 and not order[1].any()
    assert choices.ranking_logp(UTILITY.expand(2, WIDTH), allowed, order).tolist() == [0.0, 0.0]
