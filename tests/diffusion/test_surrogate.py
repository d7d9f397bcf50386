"""Surrogates: values by hand, gradients at old = new, reductions that add up over shards."""

from __future__ import annotations

import math

import pytest
import torch

from dllm_rl.diffusion import surrogate
from dllm_rl.types import GlobalCounts


def test_clip_by_hand():
    log_ratio = torch.log(torch.tensor([1.5, 1.5, 0.5, 0.5, 1.1]))
    gain = surrogate.clipped(log_ratio, torch.tensor([1.0, -1.0, 1.0, -1.0, 2.0]), 0.2)
    torch.testing.assert_close(gain, torch.tensor([1.2, -1.5, 0.5, -0.8, 2.2]))
    active = surrogate.clip_active(log_ratio, torch.tensor([1.0, -1.0, 1.0, -1.0, 2.0]), 0.2)
    assert active.tolist() == [True, False, False, True, False]


def test_clip_bounds_can_differ():
    log_ratio = torch.log(torch.tensor([1.25]))
    assert surrogate.clipped(log_ratio, torch.tensor([1.0]), 0.2, 0.28).item() == pytest.approx(1.25)


def test_clip_removes_the_gradient_exactly_where_it_is_active():
    log_ratio = torch.log(torch.tensor([1.5, 1.5, 0.5, 0.5])).requires_grad_()
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0])
    (gradient,) = torch.autograd.grad(surrogate.clipped(log_ratio, advantage, 0.2).sum(), log_ratio)
    active = surrogate.clip_active(log_ratio.detach(), advantage, 0.2)
    assert torch.equal(gradient == 0, active)


@pytest.mark.parametrize(("kind", "value"), [("k1", 0.3), ("k2", 0.045), ("k3", math.exp(-0.3) - 1 + 0.3)])
def test_divergence_by_hand(kind, value):
    got = surrogate.divergence(torch.tensor([0.3]), torch.tensor([0.0]), kind)
    assert got.item() == pytest.approx(value, abs=1e-7)


@pytest.mark.parametrize(("kind", "slope"), [("k1", 1.0), ("k2", 0.0), ("k3", 0.0)])
def test_divergence_gradient_at_equality(kind, slope):
    new = torch.tensor([0.7], requires_grad=True)
    (gradient,) = torch.autograd.grad(surrogate.divergence(new, torch.tensor([0.7]), kind).sum(), new)
    assert gradient.item() == slope


def test_k1_and_k3_are_unbiased_for_the_kl_of_two_categoricals():
    new, reference = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.5, 0.3])
    kl = (new * (new / reference).log()).sum()
    for kind in ("k1", "k3"):
        torch.testing.assert_close((new * surrogate.divergence(new.log(), reference.log(), kind)).sum(), kl)


VALUE = torch.tensor([[1.0, 2.0, 30.0], [4.0, 50.0, 60.0]])
WHERE = torch.tensor([[True, True, False], [True, False, False]])
ONE = GlobalCounts(num_tokens=1, num_rows=1, num_choices=0)


@pytest.mark.parametrize(("kind", "want"), [("token_mean", 7 / 3), ("sequence_mean", 5.5 / 2), ("sequence_sum", 7 / 2)])
def test_reductions_by_hand_and_over_shards(kind, want):
    counts = GlobalCounts(num_tokens=3, num_rows=2, num_choices=0)
    assert surrogate.reduce(VALUE, WHERE, kind, counts).item() == pytest.approx(want)
    shards = [surrogate.reduce(VALUE[i : i + 1], WHERE[i : i + 1], kind, counts).item() for i in range(2)]
    assert sum(shards) == pytest.approx(want)


def test_what_is_not_scored_cannot_leak():
    value = torch.tensor([[1.0, float("inf"), float("nan")]], requires_grad=True)
    where = torch.tensor([[True, False, False]])
    total = surrogate.reduce(value, where, "token_mean", ONE)
    (gradient,) = torch.autograd.grad(total, value)
    assert total.item() == 1.0 and gradient.tolist() == [[1.0, 0.0, 0.0]]


@pytest.mark.parametrize(
    "call",
    [
        lambda: surrogate.divergence(VALUE, VALUE, "k4"),
        lambda: surrogate.reduce(VALUE, WHERE, "mean", ONE),
    ],
)
def test_unknown_names_list_the_known_ones(call):
    with pytest.raises(ValueError, match="must be one of"):
        call()


def test_deviation_and_effective_samples_by_hand():
    """Ratios e and 1: log-ratios 1 and 0; Kish: (1 + e)^2 / (2 (1 + e^2))."""
    ratio = torch.tensor([math.e, 1.0], dtype=torch.float64)
    means = {
        "log_ratio_mean": 0.5,
        "log_ratio_square": 0.5,
        "ratio_mean": ratio.mean().item(),
        "ratio_square": ratio.square().mean().item(),
        "kl": 0.25,
    }
    assert surrogate.derived_metrics(means) == {
        "log_ratio_mean": 0.5,
        "log_ratio_deviation": pytest.approx(0.5),
        "effective_samples": pytest.approx((1 + math.e) ** 2 / (2 * (1 + math.e**2))),
        "kl": 0.25,
    }
