"""Advantages, by hand on small groups."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from dllm_rl.conformance import cases
from dllm_rl.diffusion import advantage
from dllm_rl.seeding import generator_for

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


def samples_by_loop(reward, group, included, episode):
    """group -> (episode, mean reward of its included rows, those rows), one entry per sample."""
    found = {}
    for g in sorted(set(group.tolist())):
        for e in sorted(set(episode[group == g].tolist())):
            rows = [i for i in range(len(reward)) if episode[i] == e and included[i]]
            if rows:
                found.setdefault(g, []).append((e, sum(reward[i].item() for i in rows) / len(rows), rows))
    return found


def group_mean_by_loop(reward, group, included, episode):
    out = [0.0] * len(reward)
    for samples in samples_by_loop(reward, group, included, episode).values():
        mean = sum(value for _, value, _ in samples) / len(samples)
        for _, _, rows in samples:
            for row in rows:
                out[row] = reward[row].item() - mean
    return out


def leave_one_out_by_loop(reward, group, included, episode):
    out = [0.0] * len(reward)
    for samples in samples_by_loop(reward, group, included, episode).values():
        for e, _, rows in samples:
            others = [value for other, value, _ in samples if other != e]
            for row in rows if others else []:
                out[row] = reward[row].item() - sum(others) / len(others)
    return out


def z_score_by_loop(reward, group, included, episode):
    out = group_mean_by_loop(reward, group, included, episode)
    for samples in samples_by_loop(reward, group, included, episode).values():
        variance = sum(sum(out[row] ** 2 for row in rows) / len(rows) for _, _, rows in samples) / len(samples)
        for row in [row for _, _, rows in samples for row in rows]:
            out[row] = out[row] / math.sqrt(variance) if variance > 1e-10 else 0.0
    return out


def ragged(seed, *, per_turn):
    """Three groups whose samples have 1 to 4 turns, in random row order, one sample excluded."""
    generator = generator_for(seed, "ragged")
    turns = torch.randint(1, 5, (int(torch.randint(5, 12, (1,), generator=generator)),), generator=generator)
    episode = torch.arange(len(turns)).repeat_interleave(turns)
    group = (torch.arange(len(turns)) % 3).repeat_interleave(turns)
    reward = torch.randn(len(episode), generator=generator)
    if not per_turn:
        reward = torch.randn(len(turns), generator=generator).repeat_interleave(turns)
    order = torch.randperm(len(episode), generator=generator)
    return reward[order], group[order], (episode != 1)[order], episode[order]


@pytest.mark.parametrize("per_turn", [False, True], ids=["per-episode", "per-turn"])
@pytest.mark.parametrize("seed", range(20))
def test_a_sample_counts_once_whatever_its_turns(seed, per_turn):
    reward, group, included, episode = rows = ragged(seed, per_turn=per_turn)
    for name in ("group_mean", "leave_one_out", "z_score"):
        got = getattr(advantage, name)(*rows)
        torch.testing.assert_close(got, torch.tensor(globals()[f"{name}_by_loop"](*rows)), atol=1e-5, rtol=1e-4)
        assert not got[~included].any()
    components = {"a": reward, "b": reward**2}
    want = 2 * torch.tensor(z_score_by_loop(*rows)) + torch.tensor(z_score_by_loop(reward**2, *rows[1:]))
    got = advantage.per_component(components, {"a": 2.0, "b": 1.0}, group, included, episode)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    means = samples_by_loop(*rows)
    spread = [max(v for _, v, _ in means[g]) - min(v for _, v, _ in means[g]) if g in means else 0.0 for g in range(3)]
    got = advantage.spread_of_group(reward, group, included, episode)
    torch.testing.assert_close(got, torch.tensor(spread)[group], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("seed", range(5))
def test_one_turn_per_sample_gives_the_same_bits_as_no_episodes(seed):
    reward, group, included, _ = ragged(seed, per_turn=True)
    alone = torch.randperm(len(reward), generator=generator_for(seed, "alone"))
    for name in ("group_mean", "leave_one_out", "z_score", "zero_variance_groups", "spread_of_group"):
        function = getattr(advantage, name)
        assert torch.equal(function(reward, group, included, alone), function(reward, group, included)), name


def test_four_samples_of_one_to_three_turns_have_the_mean_of_four_numbers():
    episode = torch.tensor([0, 1, 1, 2, 2, 3, 3, 3])
    reward = torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0])
    group, ok = torch.zeros(8, dtype=torch.int64), torch.ones(8, dtype=torch.bool)
    torch.testing.assert_close(advantage.group_mean(reward, group, ok, episode), reward - 0.5)  # over rows: 4/8 too
    reward = torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    torch.testing.assert_close(advantage.group_mean(reward, group, ok, episode), reward - 0.25)  # over rows: 1/8
    torch.testing.assert_close(advantage.leave_one_out(reward, group, ok, episode)[1:], torch.full((7,), -1 / 3))


def test_one_sample_of_many_turns_is_no_group():
    for turns in (2, 10, 18, 42):  # ten tenths add up to more than 1
        one, ok = torch.zeros(turns, dtype=torch.int64), torch.ones(turns, dtype=torch.bool)
        got = advantage.leave_one_out(torch.arange(turns).float(), one, ok, one)
        assert not got.any(), "there is no other sample to compare with"


def test_softmax_weights_of_turns_are_those_of_their_sample():
    """Rows 0 and 1 are turns of one sample: the group has two samples, and both turns the weight of theirs."""
    reward, group, included = torch.tensor([1.0, 1.0, 0.0]), torch.zeros(3, dtype=torch.int64), torch.ones(3) > 0
    got = advantage.group_softmax(reward, group, included, torch.tensor([0, 0, 1]))
    whole = math.exp(1) + math.exp(0)
    torch.testing.assert_close(got, 2 * torch.tensor([math.exp(1), math.exp(1), math.exp(0)]) / whole)


def test_a_group_without_included_rows_has_no_softmax_weights():
    group, included = torch.tensor([0, 0, 4]), torch.tensor([True, True, False])
    assert advantage.group_softmax(torch.zeros(3), group, included).tolist() == [1.0, 1.0, 0.0]


def two_rewards(right, formed, group):
    """Rewards of rows with two components; None = the verifier failed."""
    ok = torch.tensor([one is not None for one in right])
    components = {
        "right": torch.tensor([float("nan") if one is None else float(one) for one in right]),
        "formed": torch.tensor([float(one) for one in formed]),
    }
    total = sum(value.nan_to_num(0.0) for value in components.values()) * ok
    rewards = cases.rewards(total.tolist())
    rows = cases.batch(block_causal=False, group_size=len(right) // (max(group) + 1))
    rows = dataclasses.replace(rows.select(torch.arange(len(right)) % 6), group=torch.tensor(group))
    rows = dataclasses.replace(rows, episode=torch.arange(len(right)))
    return dataclasses.replace(rewards, components=components, included=ok), rows


def test_decoupled_rewards_tell_apart_what_the_deviation_of_the_sum_makes_equal():
    """The example of arXiv:2601.05242: two rewards, groups of two rows with totals (0, 1) and (0, 2)."""
    rewards, rows = two_rewards([0, 1, 0, 1], [0, 0, 0, 1], [0, 0, 1, 1])
    assert rewards.total.tolist() == [0, 1, 0, 2]
    torch.testing.assert_close(advantage.normalised(rewards, rows), torch.tensor([-1.0, 1, -1, 1]))
    apart = advantage.decoupled(rewards, {"right": 1.0, "formed": 1.0}, rows)
    torch.testing.assert_close(advantage.normalised(apart, rows), torch.tensor([-1.0, 1, -2, 2]))
    torch.testing.assert_close(
        advantage.group_mean(apart.total, rows.group, apart.included, rows.episode), torch.tensor([-1.0, 1, -2, 2])
    )
    weighted = advantage.decoupled(rewards, {"right": 2.0, "formed": 0.0}, rows)
    torch.testing.assert_close(weighted.total, torch.tensor([-2.0, 2, -2, 2]))
    assert advantage.decoupled(rewards, {"right": 2.0}, rows).total.tolist() == [-2, 2, -3, 3], "unlisted weighs 1"


def test_decoupled_rewards_in_float64_by_enumeration():
    """Against the equation, group by group, with a row that failed and a large second reward."""
    right, formed, group = [1, 0, None, 1, 0, 0], [300, 100, 200, 100, 500, 100], [0, 0, 0, 1, 1, 1]
    rewards, rows = two_rewards(right, formed, group)
    got = advantage.decoupled(rewards, {"right": 1.0, "formed": 0.5}, rows)

    def z(values):
        values = torch.tensor(values, dtype=torch.float64)
        return (values - values.mean()) / values.std(correction=0)

    first = z([1, 0]) + 0.5 * z([300, 100])
    second = z([1, 0, 0]) + 0.5 * z([100, 500, 100])
    want = torch.cat([first, torch.zeros(1, dtype=torch.float64), second])
    torch.testing.assert_close(got.total.double(), want, atol=1e-6, rtol=0)
    assert got.decoupled and got.select(torch.tensor([0, 3])).decoupled and not rewards.decoupled
    assert got.components is rewards.components and torch.equal(got.solved, rewards.solved)


def test_rewards_that_cancel_give_no_signal():
    value = [0.1, 0.7, 0.3]
    rewards, rows = two_rewards(value, [1 - one for one in value], [0, 0, 0])
    assert advantage.decoupled(rewards, {}, rows).total.tolist() == [0, 0, 0]
