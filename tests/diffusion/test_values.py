"""Advantages along a trajectory, against the recursion written out in Python."""

from __future__ import annotations

import pytest
import torch

from dllm_rl.diffusion.masking import along_trajectory, merged_steps
from dllm_rl.diffusion.values import advantages_and_returns, value_error

STEP = torch.tensor([[9, 0, 2, 1, 1, 9], [9, 0, 0, 9, 9, 9], [9, 3, 2, 1, 0, 0]])
SCORED = STEP < 9
REWARD = torch.tensor([1.0, 0.0, 0.5], dtype=torch.float64)
VALUE = torch.rand(STEP.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def by_hand(row, discount, smoothing):
    """{position: (A, R)} by the recursion over steps."""
    places = [i for i in range(STEP.shape[1]) if SCORED[row, i]]
    last = max(int(STEP[row, i]) for i in places)
    reward = {i: float(REWARD[row]) if STEP[row, i] == last else 0.0 for i in places}
    found, total, following, advantage = {}, 0.0, 0.0, 0.0
    for t in range(last, -1, -1):
        here = [i for i in places if STEP[row, i] == t]
        for i in here:
            value = float(VALUE[row, i])
            found[i] = (
                reward[i] - value + discount * following + discount * smoothing * advantage,
                reward[i] + discount * total,
            )
        paid, pooled = sum(reward[i] for i in here) / len(here), sum(float(VALUE[row, i]) for i in here) / len(here)
        advantage = paid - pooled + discount * following + discount * smoothing * advantage
        total, following = paid + discount * total, pooled
    return found


@pytest.mark.parametrize(("discount", "smoothing"), [(1.0, 1.0), (0.9, 1.0), (0.9, 0.7), (1.0, 0.0), (0.0, 0.5)])
def test_against_the_recursion(discount, smoothing):
    advantage, target = advantages_and_returns(REWARD, VALUE, STEP, SCORED, discount=discount, smoothing=smoothing)
    for row in range(len(STEP)):
        for i, (a, r) in by_hand(row, discount, smoothing).items():
            assert advantage[row, i].item() == pytest.approx(a), (row, i)
            assert target[row, i].item() == pytest.approx(r), (row, i)
    assert not advantage[~SCORED].any() and not target[~SCORED].any()


def test_without_discount_the_advantage_is_the_reward_minus_the_prediction():
    advantage, target = advantages_and_returns(REWARD, VALUE, STEP, SCORED, discount=1.0, smoothing=1.0)
    reward = REWARD[:, None].expand(STEP.shape)
    torch.testing.assert_close(advantage[SCORED], (reward - VALUE)[SCORED])
    torch.testing.assert_close(target[SCORED], reward[SCORED])


def test_value_error_by_hand():
    """Target 1, old 0.5, clip 0.2: a prediction of 0.9 counts as 0.7; one of 0.6 as itself."""
    new, old, target = torch.tensor([0.9, 0.6, 1.4]), torch.full((3,), 0.5), torch.ones(3)
    torch.testing.assert_close(value_error(new, old, target, 0.2), torch.tensor([0.3**2, 0.4**2, 0.4**2]) / 2)


@pytest.mark.parametrize("merge", [1, 2, 3])
def test_merged_steps_are_the_draws_of_the_trajectory(merge):
    unmask = torch.tensor([[-1, 0, 4, 2, 7, 7, 9], [-1, 1, 0, 2, 3, 5, 8]])
    scored = torch.tensor([[False, True, True, True, True, True, False], [False, True, True, True, True, True, True]])
    masks = along_trajectory(unmask, scored, merge=merge)
    want = (masks.weight.argmax(0) * scored)[scored]
    assert merged_steps(unmask, scored, merge=merge)[scored].tolist() == want.tolist()


def test_blocks_follow_one_another():
    unmask = torch.tensor([[-1, 1, 0, 2, 4, 3, 3]])
    blocks = torch.tensor([[-1, 0, 0, 0, 1, 1, 1]])
    scored = unmask >= 0
    assert merged_steps(unmask, scored, block_ids=blocks)[scored].tolist() == [1, 0, 2, 4, 3, 3]
    assert merged_steps(unmask, scored, block_ids=blocks, merge=2)[scored].tolist() == [0, 0, 1, 2, 2, 2]
