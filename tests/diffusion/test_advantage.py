"""Advantages, by hand on small groups."""

from __future__ import annotations

import math

import pytest
import torch

from dllm_rl.diffusion import advantage

GROUP = torch.tensor([0, 1, 0, 1, 0, 1, 2])
REWARD = torch.tensor([1.0, 4.0, 0.0, 4.0, 2.0, 4.0, 9.0])
ALL = torch.ones(7, dtype=torch.bool)
GROUPS = [g == GROUP for g in range(3)]


def test_group_mean_by_hand():
    assert advantage.group_mean(REWARD, GROUP, ALL).tolist() == [0, 0, -1, 0, 1, 0, 0]


def test_leave_one_out_is_the_mean_of_the_others_and_scales_group_mean():
    got = advantage.leave_one_out(REWARD, GROUP, ALL)
    assert got.tolist() == [1 - (0 + 2) / 2, 0, 0 - 3 / 2, 0, 2 - 1 / 2, 0, 0]
    torch.testing.assert_close(got[GROUP == 0], advantage.group_mean(REWARD, GROUP, ALL)[GROUP == 0] * 3 / 2)


def test_z_score_uses_the_population_deviation():
    got = advantage.z_score(REWARD, GROUP, ALL)
    deviation = math.sqrt(2 / 3)
    torch.testing.assert_close(got, torch.tensor([0, 0, -1 / deviation, 0, 1 / deviation, 0, 0]))


def test_equal_rewards_give_exactly_zero_even_when_their_mean_rounds():
    reward = torch.full((6,), 0.1)
    group = torch.zeros(6, dtype=torch.int64)
    for function in (advantage.z_score, advantage.group_mean, advantage.leave_one_out):
        assert advantage.z_score(reward, group, torch.ones(6, dtype=torch.bool)).abs().max() == 0
        assert function(reward, group, torch.ones(6, dtype=torch.bool)).abs().max() < 1e-7


@pytest.mark.parametrize("function", [advantage.group_mean, advantage.leave_one_out, advantage.z_score])
def test_excluded_rows_get_zero_and_enter_no_baseline(function):
    included = ALL.clone()
    included[4] = False  # the row with reward 2 of group 0
    spoiled = REWARD.clone()
    spoiled[4] = 1e6
    got = function(spoiled, GROUP, included)
    without = function(REWARD[[0, 2]], torch.tensor([0, 0]), torch.ones(2, dtype=torch.bool))
    assert got[4] == 0
    torch.testing.assert_close(got[[0, 2]], without)


def test_per_component_normalises_before_adding():
    components = {"accuracy": torch.tensor([1.0, 0, 0, 1]), "speed": torch.tensor([100.0, 300, 100, 300])}
    group, included = torch.zeros(4, dtype=torch.int64), torch.ones(4, dtype=torch.bool)
    got = advantage.per_component(components, {"accuracy": 1.0, "speed": 0.5}, group, included)
    torch.testing.assert_close(got, torch.tensor([1 - 0.5, -1 + 0.5, -1 - 0.5, 1 + 0.5]))


def test_a_component_that_does_not_apply_is_absent_not_zero():
    components = {"a": torch.tensor([1.0, 0.0, float("nan")])}
    group, included = torch.zeros(3, dtype=torch.int64), torch.ones(3, dtype=torch.bool)
    got = advantage.per_component(components, {"a": 1.0}, group, included)
    torch.testing.assert_close(got, torch.tensor([1.0, -1.0, 0.0]))


def test_zero_variance_groups():
    flags = advantage.zero_variance_groups(REWARD, GROUP, ALL)
    assert [bool(flags[g].all()) for g in GROUPS] == [False, True, True]
    assert not flags[GROUP == 0].any()
