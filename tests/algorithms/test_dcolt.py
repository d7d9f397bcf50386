"""DCoLT: the gradient of a whole trajectory, with its order, against the enumerated policy gradient."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from dllm_rl.conformance import cases
from dllm_rl.conformance.algorithms import Subject
from dllm_rl.protocols.algorithm import Plan
from dllm_rl.seeding import generator_for
from dllm_rl.types import LikelihoodEstimate, Sampling
from rollouts import choices

NAME = "algorithms.dcolt:DCoLT"
FIRST, SECOND, VOCABULARY = 3, 4, 2  # the two positions of the canvas


def test_gradient_at_the_old_policy():
    """d loss / d log p_i = d loss / d log pi_s = -A / (N T), for tokens and choices of the row's T forwards."""
    subject = Subject(NAME, {})
    for (batch,) in subject.cases():
        batch = dataclasses.replace(batch, num_forwards=torch.tensor([4, 3, 4, 4, 4, 2]))
        batch = dataclasses.replace(batch, unmask_step=batch.unmask_step.minimum(batch.num_forwards[:, None] - 1))
        seen = subject.experience(batch)
        _, gradient = subject.gradient(seen, seen.old)
        slope = -seen.advantage[:, None].double() / (len(batch) * batch.num_forwards[:, None])
        tokens = torch.where(batch.completion, slope, 0.0)
        happened = torch.arange(4) < batch.num_forwards[:, None]
        want = torch.cat([tokens, torch.where(happened, slope, 0.0)], dim=1)
        torch.testing.assert_close(gradient, want, rtol=1e-6, atol=1e-12)


def two_positions(order):
    """A row whose canvas is two tokens, committed one after the other."""
    batch = cases.batch(block_causal=False).select(torch.tensor([0]))
    canvas = torch.zeros_like(batch.completion)
    canvas[0, FIRST : SECOND + 1] = True
    step = torch.full_like(batch.unmask_step, -1)
    step[0, list(order)] = torch.arange(2)
    return dataclasses.replace(
        batch, completion=canvas, tail=torch.zeros_like(canvas), unmask_step=step, num_forwards=torch.tensor([2])
    )


@pytest.mark.parametrize("steps", [1, 2])
def test_the_sum_over_all_trajectories_is_the_policy_gradient(steps):
    """Two positions, two tokens: all orders and tokens, in float64; committed in two steps, or both in one.

    sum over trajectories of P dloss = - 1/T d(sum of P R), for R of order and tokens.
    """
    subject, generator = Subject(NAME, {}), generator_for(0)
    utility = torch.randn(2, dtype=torch.float64, generator=generator).requires_grad_()
    # Token logits by position, and by what the other position holds: 0 masked, else token + 1.
    logits = torch.randn(2, VOCABULARY + 1, VOCABULARY, dtype=torch.float64, generator=generator).requires_grad_()
    reward = torch.randn(2, VOCABULARY, VOCABULARY, dtype=torch.float64, generator=generator)
    logp, value, surrogate = logits.log_softmax(-1), 0.0, 0.0
    allowed = torch.ones(1, 2, dtype=torch.bool)
    orders = [(0, 1), (1, 0)] if steps == 2 else [(0, 1)]
    for number, (first, second) in enumerate(orders):
        for tokens in itertools.product(range(VOCABULARY), repeat=2):
            order = torch.zeros(1, 2, dtype=torch.int64)
            order[0, [first] if steps == 2 else [first, second]] = torch.arange(1, 2 if steps == 2 else 3)
            chosen = choices.ranking_logp(utility[None], allowed, order)
            own = logp[first, 0, tokens[first]]
            other = logp[second, tokens[first] + 1 if steps == 2 else 0, tokens[second]]
            total, gain = (chosen[0] + own + other).exp(), reward[number, tokens[0], tokens[1]]
            value = value + total * gain
            batch = two_positions([FIRST + first, FIRST + second])
            token = torch.zeros(batch.tokens.shape, dtype=torch.float64)
            token = token.index_put(
                (torch.tensor([0, 0]), FIRST + torch.tensor([first, second])), torch.stack([own, other])
            )
            choice = torch.cat([chosen, torch.zeros(1, dtype=torch.float64)])[None]
            if steps == 1:
                step = torch.where(batch.unmask_step >= 0, 0, -1)
                batch, choice = (
                    dataclasses.replace(batch, unmask_step=step, num_forwards=torch.tensor([1])),
                    choice[:, :1],
                )
            new = LikelihoodEstimate(token_logp=token, choice_logp=choice)
            old = LikelihoodEstimate(token_logp=token.detach(), choice_logp=choice.detach())
            masks = subject.masks(batch)
            seen = cases.experience(batch, cases.rewards([1.0]), gain[None], masks, old, None)
            surrogate = surrogate + total.detach() * subject.algorithm.loss(new, seen).value
    wanted = torch.autograd.grad(-value / steps, [utility, logits], retain_graph=True, allow_unused=True)
    got = torch.autograd.grad(surrogate, [utility, logits], allow_unused=True)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    assert steps == 1 or wanted[0].abs().min() > 1e-3, "the order matters"


def test_a_step_is_clipped_as_one():
    """Token ratios within the clip, whose product with the choice's is not: no gradient for either."""
    subject = Subject(NAME, {})
    batch = two_positions([FIRST, SECOND])
    old = LikelihoodEstimate(
        token_logp=torch.zeros(batch.tokens.shape, dtype=torch.float64),
        choice_logp=torch.zeros(1, 2, dtype=torch.float64),
    )
    token = old.token_logp.clone()
    token[0, FIRST] = token[0, SECOND] = 0.15
    new = LikelihoodEstimate(token_logp=token, choice_logp=torch.tensor([[0.15, 0.0]], dtype=torch.float64))
    seen = cases.experience(batch, cases.rewards([1.0]), torch.ones(1), subject.masks(batch), old, None)
    _, gradient = subject.gradient(seen, new)
    assert gradient[0, FIRST] == gradient[0, -2] == 0.0 and gradient[0, SECOND] != 0.0 != gradient[0, -1]


def test_plans_without_a_policy_or_with_greedy_tokens_are_refused():
    def check(*, has_policy, temperature):
        sampling = Sampling(max_new_tokens=4, temperature=temperature)
        plan = Plan(sampling=sampling, strategy="margin", has_policy=has_policy, examples=(), task="t")
        Subject(NAME, {}).algorithm.check_plan(plan)

    check(has_policy=True, temperature=1.0)
    with pytest.raises(ValueError, match=r"'margin' has none; set sampling\.strategy to \{name: learned, distrib"):
        check(has_policy=False, temperature=1.0)
    with pytest.raises(ValueError, match="gives credit to tokens too, so they must be sampled"):
        check(has_policy=True, temperature=0.0)
