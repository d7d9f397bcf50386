"""At old = new = reference, every loss has the REINFORCE gradient of its equation, written out by hand."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from dllm_rl import registry
from dllm_rl.conformance import cases
from dllm_rl.conformance.algorithms import Subject
from dllm_rl.diffusion import advantage

# name, options -> d loss / d l_i of one token, from A (its row's advantage), C (its row's tokens), T (all tokens),
# N (rows) and s (1 if its row is solved). The sign of the equation's J is turned: losses are minimised.
BY_HAND = [
    ("masked_sft", {}, lambda A, C, T, N, s: -1 / (C * N)),
    ("masked_sft", {"reduction": "token_mean"}, lambda A, C, T, N, s: -1 / T),
    ("diffu_grpo", {}, lambda A, C, T, N, s: -A / T),
    ("coupled_grpo", {}, lambda A, C, T, N, s: -A / T),
    ("coupled_grpo", {"reduction": "sequence_sum", "full_view": True}, lambda A, C, T, N, s: -A / N),
    ("trace_rl", {}, lambda A, C, T, N, s: -A / T),
    ("igpo", {}, lambda A, C, T, N, s: -A / T),  # the ratio of a row is in each of its C terms, each with slope 1/C
    ("just_grpo", {}, lambda A, C, T, N, s: -A / N),
    ("espo", {}, lambda A, C, T, N, s: -A / (C * N)),
    ("gdpo", {"beta": 0.1}, lambda A, C, T, N, s: -A / (C * N)),
    ("lightning_rl", {}, lambda A, C, T, N, s: -A / (C * N) - 0.1 * s / T),
    ("lightning_rl", {"paper_exact": True, "anchor": 0.0}, lambda A, C, T, N, s: -A / (C * N)),
    ("wd1", {}, lambda A, C, T, N, s: -A / N),
    # s = 0: d(-log sigmoid)/ds = -1/2; N / 2 pairs; chosen rows (A = 1, s = 1) carry the anchor
    ("vrpo", {}, lambda A, C, T, N, s: -0.5 * 0.2 * A / (N / 2) - 0.05 * s / (C * N / 2)),
]


@pytest.mark.parametrize(("name", "options", "formula"), BY_HAND, ids=[f"{n} {o or ''}" for n, o, _ in BY_HAND])
def test_gradient_at_the_old_policy(name, options, formula):
    subject = Subject(name, options)
    for (batch,) in subject.cases():
        experience = subject.experience(batch)
        reference = None if experience.reference is None else experience.old
        _, gradient = subject.gradient(dataclasses.replace(experience, reference=reference), experience.old)
        length, total = batch.completion.sum(-1).double(), batch.completion.sum().double()
        for row in range(len(batch)):
            want = formula(
                experience.advantage[row].double(),
                length[row],
                total,
                len(batch),
                float(experience.rewards.solved[row]),
            )
            got = gradient[row][batch.completion[row]]
            torch.testing.assert_close(got, torch.full_like(got, float(want)), rtol=1e-6, atol=1e-12)


def test_every_algorithm_is_in_the_table_or_has_a_file_of_its_own():
    own = {path.stem.removeprefix("test_") for path in Path(__file__).parent.glob("test_*.py")}
    assert set(registry.names("algorithms")) - {name for name, _, _ in BY_HAND} <= own


REWARDS = torch.tensor([1.0, 0.0, 0.5, 0.0, 1.0, 0.25])
GROUP = torch.tensor([0, 0, 0, 1, 1, 1])


def test_leave_one_out_is_the_scaled_mean_baseline():
    included = torch.ones(6, dtype=torch.bool)
    loo, mean = (f(REWARDS, GROUP, included) for f in (advantage.leave_one_out, advantage.group_mean))
    torch.testing.assert_close(loo, 3 / 2 * mean)
    by_hand = [1 - 0.25, 0 - 0.75, 0.5 - 0.5, 0 - 0.625, 1 - 0.125, 0.25 - 0.5]
    torch.testing.assert_close(loo, torch.tensor(by_hand))


def test_spread_and_any_read_included_rows_of_the_group():
    included = torch.tensor([True, True, False, False, False, False])
    assert advantage.spread_of_group(REWARDS, GROUP, included).tolist() == [1, 1, 1, 0, 0, 0]
    assert advantage.any_of_group(REWARDS == 1, GROUP).all()
    assert advantage.any_of_group((REWARDS == 1) & included, GROUP).tolist() == [True] * 3 + [False] * 3


def test_lightning_drops_groups_without_a_solved_row_or_a_choice_of_speed():
    algorithm = Subject("lightning_rl", {}).algorithm
    batch = cases.batch(block_causal=False)
    scored = cases.rewards([1.0, 0.0, 0.0, 0.5, 0.5, 0.0])
    assert algorithm.keep(scored, batch).tolist() == [True] * 3 + [False] * 3, "group 1 has nothing to imitate"
    same = dataclasses.replace(batch, num_forwards=batch.completion.sum(-1))
    assert not algorithm.keep(scored, same).any(), "every row decodes one token per forward"
    excluded = cases.rewards([1.0, 0.0, 0.0, 1.0, 0.5, 0.0], excluded=0)
    assert algorithm.keep(excluded, batch).tolist() == [False] * 3 + [True] * 3
