"""CJ-GRPO: the mean over rows of the mean over steps of the mean over a step's tokens."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from algorithms.cj_grpo import step_weight
from dllm_rl.conformance import cases
from dllm_rl.conformance.algorithms import Subject

STEPS = [0, 0, 0, 1, 2, 3, 3, 2]  # of the eight tokens of a canvas; blocks of four are decoded one after the other


def uneven(subject, block_causal):
    """Forwards that commit 3, 1, 2 and 2 tokens; row 1 ends after 5 tokens, row 5 after 3."""
    batch = subject.batch(block_causal)
    step = batch.unmask_step.clone()
    for row, start in enumerate(batch.prompt_length.tolist()):
        step[row, start : start + cases.CANVAS] = torch.tensor(STEPS)
    return dataclasses.replace(batch, unmask_step=step)


def sizes(batch, row):
    """{position: (number of steps of the row, tokens of its step)}, counted one by one."""
    start, length = int(batch.prompt_length[row]), int(batch.completion[row].sum())
    steps = STEPS[:length]
    return {start + i: (len(set(steps)), steps.count(steps[i])) for i in range(length)}


@pytest.mark.parametrize("block_causal", [False, True])
@pytest.mark.parametrize("at_old", [True, False])
def test_loss_and_gradient_by_loops(block_causal, at_old):
    epsilon, beta = 0.3, 0.1
    subject = Subject("cj_grpo", {"epsilon": epsilon, "beta": beta})
    batch = uneven(subject, block_causal)
    experience = subject.experience(batch)
    new = experience.old if at_old else subject.estimate(batch, experience.masks, seed=3)
    old, reference = experience.old.token_logp, experience.reference.token_logp
    value, slope = 0.0, torch.zeros_like(old)
    for row in range(len(batch)):
        advantage = float(experience.advantage[row])
        for i, (steps, tokens) in sizes(batch, row).items():
            share = 1 / (len(batch) * steps * tokens)
            ratio = math.exp(float(new.token_logp[row, i] - old[row, i]))
            clipped = min(max(ratio, 1 - epsilon), 1 + epsilon)
            away = math.exp(float(reference[row, i] - new.token_logp[row, i]))
            kl = away - 1 - math.log(away)
            value -= share * (min(ratio * advantage, clipped * advantage) - beta * kl)
            moves = ratio * advantage <= clipped * advantage
            slope[row, i] = -share * (ratio * advantage * moves - beta * (1 - away))
    loss, gradient = subject.gradient(experience, new)
    assert float(loss) == pytest.approx(value, rel=1e-6)
    torch.testing.assert_close(gradient, slope, rtol=1e-6, atol=1e-9)


def test_steps_of_different_blocks_are_different_steps():
    """Both blocks of a row are decoded in the same forwards 0 and 1, as an engine that decodes blocks at once would."""
    subject = Subject("cj_grpo", {})
    batch = subject.batch(True)
    step = batch.unmask_step.clone()
    start = int(batch.prompt_length[0])
    step[0, start : start + 8] = torch.tensor([0, 0, 0, 1, 0, 1, 1, 1])
    got = step_weight(dataclasses.replace(batch, unmask_step=step))[0, start : start + 8]
    torch.testing.assert_close(got, torch.tensor([1 / 12, 1 / 12, 1 / 12, 1 / 4, 1 / 4, 1 / 12, 1 / 12, 1 / 12]))


def test_weights_of_a_row_sum_to_one_without_its_hints():
    subject = Subject("cj_grpo", {})
    batch = uneven(subject, False)
    hint = torch.zeros_like(batch.hint)
    hint[0, 3:5] = True  # two of the three tokens of its first step
    weight = step_weight(dataclasses.replace(batch, hint=hint))
    torch.testing.assert_close(weight.sum(-1), torch.ones(len(batch)))
    assert weight[0, 3:7].tolist() == [0.0, 0.0, 0.25, 0.25]
