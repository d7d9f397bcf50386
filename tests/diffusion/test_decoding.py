"""Proposing tokens and choosing positions."""

from __future__ import annotations

import math

import pytest
import torch

from dllm_rl.diffusion.decoding import draw_best, propose, take_best
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


LOGITS = 3 * torch.randn(400, 12, generator=generator_for(1))
NOISE = uniform(torch.arange(400), 0, 0)


def settings_of(**settings):
    return Sampling(max_new_tokens=1, **settings)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_sampled_confidence_is_that_of_the_tempered_and_filtered_distribution(temperature):
    """Expected values: top_p, then top_k of the probabilities in float64, written out row by row."""
    filters = {"top_p": 0.9, "top_k": 3, "top_p_first": True, "confidence": "sampled"}
    p = propose(LOGITS, settings_of(temperature=temperature, **filters), NOISE, mask_id=0)
    plain = propose(LOGITS, settings_of(temperature=temperature), NOISE, mask_id=0)
    changed = 0
    for row in range(400):
        odds = (LOGITS[row].double() / (temperature or 1)).index_fill(0, torch.tensor([0]), -torch.inf).softmax(-1)
        order = odds.argsort(descending=True)
        nucleus = int((odds[order].cumsum(0) - odds[order] < 0.9).sum())
        kept = torch.zeros(12, dtype=torch.float64)
        kept[order[: min(nucleus, 3)]] = odds[order[: min(nucleus, 3)]]
        kept /= kept.sum()
        best = kept.sort(descending=True).values
        assert p.confidence[row].exp().item() == pytest.approx(kept[p.token[row]].item(), abs=1e-5)
        assert p.margin[row].item() == pytest.approx((best[0] - best[1]).item(), abs=1e-5)
        assert p.entropy[row].item() == pytest.approx(-(kept * kept.clamp(1e-300).log()).sum().item(), abs=1e-5)
        changed += abs(p.confidence[row] - plain.confidence[row]).item() > 1e-3
    assert changed > 300
    own = LOGITS.index_fill(-1, torch.tensor([0]), -torch.inf).log_softmax(-1).gather(-1, p.token[:, None])[:, 0]
    torch.testing.assert_close(p.logp, own)  # the model's own, whatever ranks positions
    torch.testing.assert_close(p.sampled_logp, p.confidence if temperature else torch.zeros(400))  # ranked by the same
    unranked = propose(
        LOGITS, settings_of(temperature=temperature, **filters | {"confidence": "model"}), NOISE, mask_id=0
    )
    assert torch.equal(unranked.sampled_logp, p.sampled_logp) and not torch.equal(unranked.confidence, p.confidence)


def test_the_order_of_the_filters_matters():
    """0.5 of the mass is in the two best tokens: 0.45 of all is two tokens, 0.45 of the best two is one."""
    logits = torch.tensor([0.0, 0.3, 0.2, 0.2, 0.3]).log().expand(DRAWS, -1) + torch.tensor([0, 0.01, 0, 0, 0])
    noise = uniform(torch.arange(DRAWS), 0, 0)

    def drawn_tokens(**more):
        return set(propose(logits, settings_of(top_k=2, top_p=0.45, **more), noise, mask_id=0).token.tolist())

    assert drawn_tokens() == {1} and drawn_tokens(top_p_first=True) == {1, 4}


def test_guidance_moves_tokens_and_confidence_but_not_the_models_own_log_probability():
    other, scale = 3 * torch.randn(400, 12, generator=generator_for(2)), 1.5
    p = propose(LOGITS, settings_of(temperature=0.0, cfg_scale=scale), NOISE, mask_id=0, unconditional=other)
    guided = (other + (scale + 1) * (LOGITS - other)).index_fill(-1, torch.tensor([0]), -torch.inf).log_softmax(-1)
    assert torch.equal(p.token, guided.argmax(-1))
    torch.testing.assert_close(p.confidence, guided.max(-1).values)
    own = LOGITS.index_fill(-1, torch.tensor([0]), -torch.inf).log_softmax(-1)
    torch.testing.assert_close(p.logp, own.gather(-1, p.token[:, None])[:, 0])
    assert (p.token != own.argmax(-1)).float().mean() > 0.3


def test_suppressed_tokens_are_never_proposed_and_deferred_ones_have_no_confidence():
    plain = propose(LOGITS, settings_of(), NOISE, mask_id=0)
    p = propose(LOGITS, settings_of(suppress_tokens=(3, 5), defer_tokens=(4, 7)), NOISE, mask_id=0)
    assert {3, 4, 5, 7} <= set(plain.token.tolist()) and not {3, 5} & set(p.token.tolist())
    deferred = (p.token == 4) | (p.token == 7)
    assert deferred.sum() > 20 and torch.equal(p.confidence == -torch.inf, deferred) and p.logp.isfinite().all()
    rest = LOGITS.index_fill(-1, torch.tensor([0, 3, 4, 5, 7]), -torch.inf).log_softmax(-1)
    torch.testing.assert_close(p.confidence, rest.gather(-1, p.token[:, None])[:, 0])
    with pytest.raises(ValueError, match=r"defer_tokens .* set sampling.confidence to model"):
        settings_of(defer_tokens=(4,), confidence="sampled")


def test_positions_are_drawn_without_replacement_in_proportion():
    """All ordered pairs of three eligible positions, against p_i p_j / (1 - p_i) with p = softmax(score / T)."""
    score, temperature = torch.tensor([[0.5, 9.0, 0.1, 0.3]]), 0.2
    eligible = torch.tensor([[True, False, True, True]])
    p = (score[0, [0, 2, 3]].double() / temperature).softmax(-1).tolist()
    noise = uniform(torch.arange(DRAWS)[:, None], 0, torch.arange(4))
    chosen = draw_best(
        score.expand(DRAWS, -1), eligible.expand(DRAWS, -1), torch.full((DRAWS,), 2), noise, temperature=temperature
    )[:, [0, 2, 3]]
    for left_out in range(3):
        i, j = (n for n in range(3) if n != left_out)
        want = p[i] * p[j] / (1 - p[i]) + p[j] * p[i] / (1 - p[j])
        share = (~chosen[:, left_out]).double().mean().item()
        assert abs(share - want) <= 4 * math.sqrt(want * (1 - want) / DRAWS), (left_out, share, want)
    assert (chosen.sum(-1) == 2).all()
