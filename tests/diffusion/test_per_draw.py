"""The loss with a ratio per draw: its equation term by term, its gradient, and the case that it shares with others."""

from __future__ import annotations

import math

import pytest
import torch

from dllm_rl.conformance import cases
from dllm_rl.diffusion import masking, per_draw, surrogate
from dllm_rl.protocols.algorithm import Needs
from dllm_rl.seeding import generator_for
from dllm_rl.types import LikelihoodEstimate

BATCH = cases.batch(block_causal=False)
MASKS = masking.uniform_count(BATCH.completion, draws=3, generator=generator_for(0))
EPSILON, BETA = 0.2, 0.05


def estimate(masks, seed):
    return cases.estimate(BATCH, masks, Needs(draws=True), seed=seed)


def experience(masks, advantage):
    old, reference = (estimate(masks, seed) for seed in (1, 2))
    return cases.experience(BATCH, cases.rewards(cases.MIXED), advantage, masks, old, reference)


ADVANTAGES = {
    "per row": torch.linspace(-1, 1, len(BATCH)),
    "per token": torch.randn(BATCH.tokens.shape, generator=generator_for(1)),
    "per draw": torch.randn(MASKS.mask.shape, generator=generator_for(2)),
}


def by_hand(new, seen, factor, kind):
    """(loss, its derivative by every log-probability), with a loop for every sum of the equation; token mean."""
    loss, slope = 0.0, torch.zeros(MASKS.mask.shape, dtype=torch.float64)
    value = seen.advantage.double()
    value = value[:, None] if value.dim() == 1 else value
    value = value.expand(MASKS.mask.shape)
    for k, n, i in (MASKS.weight != 0).nonzero().tolist():
        w = float(MASKS.weight[k, n, i]) * float(factor[k, n, i]) / int(BATCH.completion.sum())
        a, logp = float(value[k, n, i]), float(new.draw_token_logp[k, n, i])
        r = math.exp(logp - float(seen.old.draw_token_logp[k, n, i]))
        d = logp - float(seen.reference.draw_token_logp[k, n, i])
        clipped = min(max(r, 1 - EPSILON), 1 + EPSILON)
        kl, dkl = (d * d / 2, d) if kind == "k2" else (math.exp(-d) - 1 + d, 1 - math.exp(-d))
        loss -= w * (min(r * a, clipped * a) - BETA * kl)
        slope[k, n, i] = -w * ((a * r if r * a <= clipped * a else 0.0) - BETA * dkl)
    return loss, slope


@pytest.mark.parametrize("name", ADVANTAGES)
@pytest.mark.parametrize("kind", ["k2", "k3"])
def test_value_and_gradient_by_hand(name, kind):
    seen, new = experience(MASKS, ADVANTAGES[name]), estimate(MASKS, 3)
    factor = torch.rand(MASKS.mask.shape, generator=generator_for(3), dtype=torch.float64)
    leaf = new.draw_token_logp.clone().requires_grad_()
    loss = per_draw.clipped_loss(
        LikelihoodEstimate(token_logp=new.token_logp, draw_token_logp=leaf),
        seen,
        epsilon=EPSILON,
        beta=BETA,
        reduction="token_mean",
        kind=kind,
        factor=factor,
    )
    value, slope = by_hand(new, seen, factor, kind)
    assert loss.value.item() == pytest.approx(value, abs=1e-12)
    torch.testing.assert_close(torch.autograd.grad(loss.value, leaf)[0], slope, atol=1e-12, rtol=0)
    assert 0.05 < loss.metrics["clip_fraction"] < 0.95, "both sides of the clip are tried"


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean", "sequence_sum"])
def test_with_one_full_view_it_is_the_loss_of_summed_likelihoods(reduction):
    masks = masking.fully_masked(BATCH.completion)
    seen, new = experience(masks, ADVANTAGES["per row"]), estimate(masks, 3)
    options = {"epsilon": EPSILON, "beta": BETA, "reduction": reduction}
    ours, theirs = per_draw.clipped_loss(new, seen, **options), surrogate.clipped_loss(new, seen, **options)
    torch.testing.assert_close(ours.value, theirs.value)
    assert ours.metrics.keys() == theirs.metrics.keys()
    for name, value in theirs.metrics.items():
        torch.testing.assert_close(ours.metrics[name], value)


def test_at_the_old_policy_every_ratio_counts_once():
    """Metrics are means over tokens: the weights of a row sum to its length, whatever the draws hide."""
    seen = experience(MASKS, ADVANTAGES["per row"])
    metrics = per_draw.clipped_loss(seen.old, seen, epsilon=EPSILON, beta=0.0, reduction="token_mean").metrics
    shown = surrogate.derived_metrics({name: float(value) for name, value in metrics.items()})
    assert shown["effective_samples"] == pytest.approx(1.0, abs=1e-6) and shown["log_ratio_deviation"] == 0
    assert float(metrics["ratio_mean"]) == pytest.approx(1.0, abs=1e-6)
