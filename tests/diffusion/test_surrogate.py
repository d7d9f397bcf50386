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
    active = surrogate.Clipping(epsilon=0.2).active(log_ratio, torch.tensor([1.0, -1.0, 1.0, -1.0, 2.0]))
    assert active.tolist() == [True, False, False, True, False]


def test_clip_bounds_can_differ():
    log_ratio = torch.log(torch.tensor([1.25]))
    assert surrogate.clipped(log_ratio, torch.tensor([1.0]), 0.2, 0.28).item() == pytest.approx(1.25)


def test_clip_removes_the_gradient_exactly_where_it_is_active():
    log_ratio = torch.log(torch.tensor([1.5, 1.5, 0.5, 0.5])).requires_grad_()
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0])
    (gradient,) = torch.autograd.grad(surrogate.clipped(log_ratio, advantage, 0.2).sum(), log_ratio)
    active = surrogate.Clipping(epsilon=0.2).active(log_ratio.detach(), advantage)
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


GROUP = torch.tensor([0, 0, 1, 1])
EVERY = torch.ones(4, dtype=torch.bool)


def gradient(clip, log_ratio, advantage, where=EVERY, group=GROUP):
    """(value, derivative) of a loss's gain by the log-ratios, in float64."""
    leaf = torch.as_tensor(log_ratio, dtype=torch.float64).requires_grad_()
    gain = torch.where(where, clip.gain(leaf, torch.as_tensor(advantage, dtype=torch.float64), where, group), 0.0).sum()
    return gain.item(), torch.autograd.grad(gain, leaf)[0]


@pytest.mark.parametrize(
    ("kind", "by_hand"),
    [  # ratios 1.5, 0.5, 1.5, 0.5 with advantages 1, 1, -1, -1; derivative by log r is r A where it is not clipped
        ("ppo", [0.0, 0.5, -1.5, 0.0]),
        ("asymmetric", [1.5, 0.5, -1.5, 0.0]),  # 1 + 0.6 above
        ("dual", [0.0, 0.5, 0.0, 0.0]),  # no more than 1.4 of negative advantages
        ("none", [1.5, 0.5, -1.5, -0.5]),
        ("unconditional", [1.2, 0.8, -1.2, -0.8]),  # clipped weights; each group's mean is 1 already
    ],
)
def test_each_clip_by_hand(kind, by_hand):
    clip = surrogate.Clipping(epsilon=0.2, clip=kind, epsilon_high=0.6, dual=1.4)
    log_ratio, advantage = torch.tensor([1.5, 0.5, 1.5, 0.5]).log(), [1.0, 1.0, -1.0, -1.0]
    _, got = gradient(clip, log_ratio, advantage)
    torch.testing.assert_close(got, torch.tensor(by_hand, dtype=torch.float64), atol=1e-6, rtol=0)
    removed = clip.active(log_ratio, torch.tensor(advantage))
    if kind != "unconditional":
        assert removed.tolist() == [value == 0 for value in by_hand]


def test_weights_of_the_unconditional_clip_sum_to_their_number_in_every_group():
    clip = surrogate.Clipping(epsilon=0.2, clip="unconditional")
    where = torch.tensor([[True, True, False], [True, False, False], [True, True, True], [True, True, True]])
    log_ratio = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    value, got = gradient(clip, log_ratio, torch.ones(4, 1), where)
    assert value == 0.0 and not got[~where].any()
    for number, count in ((0, 3), (1, 6)):
        assert got[number == GROUP].sum().item() == pytest.approx(count)
    bounded = log_ratio.double().exp().clamp(0.8, 1.2)
    torch.testing.assert_close(got[0, 0] / got[0, 1], bounded[0, 0] / bounded[0, 1])


def test_an_outlier_ruins_the_one_sided_clip_and_not_the_unconditional_one():
    """Three honest tokens and one whose ratio is estimated as 1e5 with a negative advantage."""
    log_ratio, advantage = [0.05, -0.05, 0.0, math.log(1e5)], [1.0, 1.0, 1.0, -1.0]
    share = {}
    for kind in ("ppo", "dual", "unconditional"):
        _, got = gradient(surrogate.Clipping(epsilon=0.2, clip=kind), log_ratio, advantage, group=torch.zeros(4).long())
        share[kind] = (got[3].abs() / got.abs().sum()).item()
    assert share["ppo"] > 0.9999, "the update is the outlier's alone"
    assert share["unconditional"] < 0.3 and share["dual"] == 0.0


@pytest.mark.parametrize("kind", ["ppo", "dual", "asymmetric", "unconditional", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_log_ratio_overflows(kind, dtype):
    """At 89 nats exp() is infinite in float32, and infinity times a zero derivative is NaN."""
    leaf = torch.tensor([89.0, -89.0, 2000.0, -2000.0], dtype=dtype, requires_grad=True)
    clip, advantage = surrogate.Clipping(clip=kind), torch.tensor([-1.0, 1.0, 1.0, -1.0], dtype=dtype)
    gain = clip.gain(leaf, advantage, EVERY, GROUP) - 0.1 * surrogate.divergence(leaf, torch.zeros_like(leaf), "k3")
    (got,) = torch.autograd.grad(gain.sum(), leaf)
    assert bool(torch.isfinite(gain).all()) and bool(torch.isfinite(got).all())
    figures = surrogate.ratio_metrics(leaf, advantage, clip, EVERY, 4)
    assert all(bool(torch.isfinite(value)) for value in figures.values()) and figures["log_ratio_cut"] == 1


def test_the_divergence_never_lets_go():
    """k3 is its own tangent beyond the bound: a policy far from the reference is drawn back, not pushed on."""
    leaf = torch.tensor([-5.0, -19.9, -20.1, -300.0], dtype=torch.float64, requires_grad=True)
    value = surrogate.divergence(leaf, torch.zeros_like(leaf), "k3")
    (slope,) = torch.autograd.grad(value.sum(), leaf)
    assert bool((slope < 0).all()) and bool((value.diff() > 0).all())
    torch.testing.assert_close(value[:2], torch.expm1(-leaf[:2]) + leaf[:2])
