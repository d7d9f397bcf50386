"""BGPO's objective touches the one that it bounds at the old policy, and is below it everywhere else."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from algorithms.bgpo import bounded
from dllm_rl.conformance.algorithms import Subject
from dllm_rl.diffusion import surrogate
from dllm_rl.seeding import generator_for


def drawn(generator, *, scale, draws=8, cases=4000):
    change = scale * torch.randn(draws, cases, 1, generator=generator, dtype=torch.float64)
    return change, torch.randn(cases, 1, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("epsilon", [0.05, 0.2, 1e9])
@pytest.mark.parametrize("scale", [0.02, 0.3, 3.0])
def test_a_lower_bound_of_the_clipped_objective(scale, epsilon):
    change, value = drawn(generator_for(0, "bgpo"), scale=scale)
    bound = bounded(change, value, epsilon).mean(0)
    objective = surrogate.clipped(change.mean(0), value, epsilon)
    assert (bound <= objective + 1e-12).all()
    assert (bound < objective - 1e-9).any(), "equal everywhere shows nothing"


def test_value_and_gradient_are_those_of_the_objective_at_the_old_policy():
    """Whatever the draws: the derivative by each of them, not only their sum."""
    _, value = drawn(generator_for(1, "bgpo"), scale=1.0)
    change = torch.zeros(8, len(value), 1, dtype=torch.float64, requires_grad=True)
    bound, objective = bounded(change, value, 0.2).mean(0), surrogate.clipped(change.mean(0), value, 0.2)
    torch.testing.assert_close(bound, objective)
    torch.testing.assert_close(*(torch.autograd.grad(total.sum(), change)[0] for total in (bound, objective)))


def test_far_from_the_old_policy_values_and_gradients_are_finite():
    """1 + d is negative below -1, where its logarithm is not a number; exp(d) overflows where it is not used."""
    change = torch.tensor([-5.0, -1.0, 0.0, 100.0], requires_grad=True)
    gain = bounded(change, torch.tensor([2.0, 2.0, 2.0, 2.0]), 0.2)
    assert gain.tolist() == pytest.approx([-8.0, 0.0, 2.0, 2.4])
    assert torch.autograd.grad(gain.sum(), change)[0].tolist() == [2.0, 2.0, 2.0, 0.0]


@pytest.mark.parametrize("block_causal", [False, True])
def test_loss_and_gradient_by_loops(block_causal):
    """One row, one draw at a time: C/n log p over the draw's n tokens is the draw's ELBO."""
    epsilon = 0.3
    subject = Subject("bgpo", {"draws": 3, "epsilon": epsilon})
    batch = subject.batch(block_causal)
    experience = subject.experience(batch)
    new = subject.estimate(batch, experience.masks, seed=3)
    logp, old = new.draw_token_logp.clone().requires_grad_(), experience.old.draw_token_logp
    expected = logp.new_zeros(())
    for row in range(len(batch)):
        length, value = int(batch.completion[row].sum()), experience.advantage[row].double()
        for k in range(3):
            hidden = experience.masks.mask[k, row] & batch.completion[row]
            change = length / hidden.sum() * (logp - old)[k, row, hidden].sum() / length
            ratio = 1 + change if value > 0 else change.exp()
            gain = torch.minimum(ratio * value, ratio.clamp(1 - epsilon, 1 + epsilon) * value)
            expected = expected - gain / 3 * length / experience.counts.num_tokens  # a mean over tokens
    loss, _ = subject.gradient(experience, new)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-6, atol=1e-9)
    leaf = new.draw_token_logp.clone().requires_grad_()
    value = subject.algorithm.loss(dataclasses.replace(new, draw_token_logp=leaf), experience).value
    by_loop, got = torch.autograd.grad(expected, logp)[0], torch.autograd.grad(value, leaf)[0]
    torch.testing.assert_close(got, by_loop, rtol=1e-6, atol=1e-9)
    assert (by_loop != 0).any(-1).any(0).sum() > 3, "not every row is clipped away"


def test_a_clipped_draw_is_counted_by_the_ratio_that_is_used():
    """With epsilon = 0.2, d = 0.19 is not clipped in a good row (1.19), and would be if its ratio were exp(0.19)."""
    subject = Subject("bgpo", {"draws": 1})
    experience = subject.experience(subject.batch(False))
    new = experience.old
    for change, share in ((0.19, 0.0), (0.21, float((experience.advantage > 0).double().mean()))):
        moved = dataclasses.replace(new, draw_token_logp=new.draw_token_logp + change * (experience.masks.weight != 0))
        metrics = subject.algorithm.loss(moved, experience).metrics
        assert float(metrics["clip_fraction"]) == pytest.approx(share)
