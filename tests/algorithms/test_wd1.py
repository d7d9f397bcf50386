"""wd1's weights are softmaxes within the group, and its loss is the released one."""

from __future__ import annotations

import math

import pytest
import torch

from dllm_rl.conformance import cases
from dllm_rl.conformance.algorithms import Subject

REWARDS = [1.0, 0.0, 0.5, 0.0, 1.0, 0.25]  # two groups of three


def softmax(values):
    odds = [math.exp(value) for value in values]
    return [o / sum(odds) for o in odds]


@pytest.mark.parametrize("psi", [1.0, 3.0])
def test_weights_by_hand(psi):
    algorithm, batch = Subject("wd1", {"psi": psi}).algorithm, cases.batch(block_causal=False)
    want = []
    for group in (REWARDS[:3], REWARDS[3:]):
        up, down = softmax([psi * r for r in group]), softmax([-psi * r for r in group])
        want += [3 * (u - d) for u, d in zip(up, down, strict=True)]
    torch.testing.assert_close(algorithm.advantages(cases.rewards(REWARDS), batch), torch.tensor(want))


def test_a_failed_row_leaves_the_softmax_of_its_group():
    algorithm, batch = Subject("wd1", {}).algorithm, cases.batch(block_causal=False)
    got = algorithm.advantages(cases.rewards(REWARDS, excluded=1), batch)
    up, down = softmax([1.0, 0.5]), softmax([-1.0, -0.5])
    torch.testing.assert_close(got[:3], torch.tensor([2 * (up[0] - down[0]), 0.0, 2 * (up[1] - down[1])]))


def test_weights_of_huge_rewards_are_finite():
    algorithm, batch = Subject("wd1", {"psi": 50.0}).algorithm, cases.batch(block_causal=False)
    got = algorithm.advantages(cases.rewards([100.0, 0.0, -100.0] * 2), batch)
    torch.testing.assert_close(got, torch.tensor([3.0, 0.0, -3.0] * 2))


def test_loss_and_gradient_are_the_released_ones():
    """Per group: minus the likelihoods weighted by softmax(A), plus those weighted by softmax(-A); mean over groups."""
    subject = Subject("wd1", {})
    experience = subject.experience(subject.batch(False))
    new = subject.estimate(experience.batch, experience.masks, seed=3)
    logp = new.token_logp.clone().requires_grad_()
    row = (logp * experience.batch.completion).sum(-1)
    expected = row.new_zeros(())
    for rows in (slice(0, 3), slice(3, 6)):
        centred = torch.tensor(REWARDS[rows], dtype=torch.float64)
        centred = centred - centred.mean()
        expected = expected + ((torch.softmax(-centred, 0) - torch.softmax(centred, 0)) * row[rows]).sum() / 2
    loss, gradient = subject.gradient(experience, new)
    torch.testing.assert_close(loss, expected.detach(), rtol=0, atol=1e-6)  # advantages are float32
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, logp)[0], rtol=0, atol=1e-6)
