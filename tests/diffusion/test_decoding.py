"""Proposing tokens and choosing positions."""

from __future__ import annotations

import math

import pytest
import torch

from dllm_rl.diffusion.decoding import propose, take_best
from dllm_rl.seeding import generator_for, uniform
from dllm_rl.types import Sampling

DRAWS = 20_000
PROBABILITY = torch.tensor([0.3, 0.4, 0.2, 0.06, 0.04])  # token 0 is the mask token
CLEAN = PROBABILITY[1:] / PROBABILITY[1:].sum()


def drawn(**settings):
    sampling = Sampling(max_new_tokens=1, **settings)
    noise = uniform(torch.arange(DRAWS), 0, 0)
    return propose(PROBABILITY.log().expand(DRAWS, -1), sampling, noise, mask_id=0)


@pytest.mark.parametrize(
    ("settings", "want"),
    [
        ({}, CLEAN),
        ({"temperature": 0.5}, CLEAN**2 / (CLEAN**2).sum()),
        ({"top_k": 2}, torch.tensor([2 / 3, 1 / 3, 0, 0])),
        ({"top_p": 0.6}, torch.tensor([2 / 3, 1 / 3, 0, 0])),  # 0.57 alone is less than 0.6
        ({"top_p": 0.5}, torch.tensor([1.0, 0, 0, 0])),
        ({"top_k": 3, "top_p": 0.95}, torch.tensor([20, 10, 3, 0]) / 33),
    ],
)
def test_draws_follow_the_distribution(settings, want):
    token = drawn(**settings).token
    share = torch.bincount(token, minlength=5)[1:] / DRAWS
    error = (want * (1 - want) / DRAWS).sqrt()
    assert ((share - want).abs() <= 4 * error + 1e-12).all(), (share, want)
    assert not (token == 0).any(), "the mask token was sampled"


@pytest.mark.parametrize("settings", [{"top_k": 3}, {"top_p": 0.7}])
def test_a_tie_at_the_edge_keeps_the_lower_ids(settings):
    logits = torch.tensor([0.0, 0.4, 0.2, 0.2, 0.2]).log().expand(DRAWS, -1)  # 0.4 + 0.2 + half of the next is 0.7
    noise = uniform(torch.arange(DRAWS), 0, 0)
    token = propose(logits, Sampling(max_new_tokens=1, **settings), noise, mask_id=0).token
    assert set(token.tolist()) == {1, 2, 3}


def test_figures_are_those_of_the_untempered_distribution():
    for settings in ({"temperature": 0.5}, {"top_k": 1}, {"temperature": 0.0}):
        p = drawn(**settings)
        torch.testing.assert_close(p.logp, CLEAN.log()[p.token - 1])
        torch.testing.assert_close(p.entropy, (-(CLEAN * CLEAN.log()).sum()).expand(DRAWS))
        torch.testing.assert_close(p.margin, (CLEAN[0] - CLEAN[1]).expand(DRAWS))


def test_greedy_takes_the_most_likely_clean_token():
    logits = torch.tensor([[9.0, 1.0, 3.0], [9.0, 2.0, 1.0]])
    p = propose(logits, Sampling(max_new_tokens=1, temperature=0.0), torch.tensor([0.5, 0.5]), mask_id=0)
    assert p.token.tolist() == [2, 1]


def test_certain_distributions_have_zero_entropy_not_nan():
    p = propose(torch.tensor([[0.0, 500.0, -500.0]]), Sampling(max_new_tokens=1), torch.tensor([0.3]), mask_id=0)
    assert p.entropy.item() == 0.0 and p.logp.item() == 0.0 and p.margin.item() == 1.0


def test_rare_tokens_keep_their_probability_in_a_large_vocabulary():
    """2^17 - 1 equal tokens beside one that holds almost everything: float32 running sums would lose the last ones."""
    size = 1 << 17
    logits = torch.zeros(3, size)
    logits[:, 1] = 30.0  # each of the others has probability 9.4e-14
    rest = 1 - 1 / (1 + (size - 2) * math.exp(-30))
    noise = torch.tensor([0.5, 1 - rest * 0.5, 1 - rest * 1e-5], dtype=torch.float64)
    p = propose(logits, Sampling(max_new_tokens=1), noise, mask_id=0)
    assert p.token[0] == 1
    assert p.token[1].item() == pytest.approx(size // 2, rel=0.01)
    assert p.token[2].item() == pytest.approx(size - 1, abs=300)  # a step of float64 near 1 is 0.1% of rest
    assert p.logp[2].item() == pytest.approx(-30, abs=1e-4)


@pytest.mark.parametrize("mask_id", [0, 4])
@pytest.mark.parametrize("noise", [2.0**-53, 1 - 2.0**-53])
def test_extreme_noise_never_draws_the_mask_token(mask_id, noise):
    logits = 5 * torch.randn(2000, 5, generator=generator_for(0))
    extreme = torch.full((2000,), noise, dtype=torch.float64)
    p = propose(logits, Sampling(max_new_tokens=1), extreme, mask_id=mask_id)
    assert not (p.token == mask_id).any() and p.logp.isfinite().all()


@pytest.mark.parametrize("size", [8, 64, 1000])
def test_of_equal_logits_the_lower_ids_are_kept(size):
    """Logits in bfloat16 tie often; which token wins must not be left to a sorting routine."""
    first = size // 3
    logits = torch.zeros(2, size)
    logits[:, first:] = 1.0

    def last_kept(**settings):
        noise = torch.full((2,), 1 - 1e-12, dtype=torch.float64)
        return set(propose(logits, Sampling(max_new_tokens=1, **settings), noise, mask_id=0).token.tolist())

    assert last_kept(temperature=0.0) == {first}
    assert last_kept(top_k=1) == {first}
    assert last_kept(top_k=3) == {first + 2}
    assert last_kept(top_k=4, top_p=0.5) == {first + 1}  # two of four equal tokens reach one half
    assert last_kept(top_p=1e-6) == {first}


def test_take_best_by_hand():
    score = torch.tensor([[0.1, 0.9, 0.5, 0.9], [0.3, 0.3, 0.3, 0.3], [float("-inf"), 1.0, 0.0, 0.0]])
    hidden = torch.tensor([[True, False, True, True], [True, True, True, True], [True, False, False, False]])
    chosen = take_best(score, hidden, torch.tensor([2, 3, 1]))
    assert chosen.int().tolist() == [[0, 0, 1, 1], [1, 1, 1, 0], [1, 0, 0, 0]]


def test_take_best_equals_sorting_row_by_row():
    generator = generator_for(0)
    score = torch.randn(200, 9, generator=generator)
    hidden = torch.rand(200, 9, generator=generator) < 0.6
    count = torch.randint(0, 6, (200,), generator=generator)
    chosen = take_best(score, hidden, count)
    for row in range(200):
        candidates = sorted((i for i in range(9) if hidden[row, i]), key=lambda i: -score[row, i].item())
        assert chosen[row].nonzero().flatten().tolist() == sorted(candidates[: int(count[row])])
