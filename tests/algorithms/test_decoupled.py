"""Rewards that are normalised one by one, in every method that compares the samples of a prompt."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from dllm_rl import registry
from dllm_rl.config.load import validate
from dllm_rl.config.plugins import build
from dllm_rl.conformance import cases
from dllm_rl.diffusion import advantage
from dllm_rl.driver.build import build_run
from dllm_rl.driver.collect import roll_out
from dllm_rl.reports.clock import Clock
from dllm_rl.reports.progress import Quiet
from dllm_rl.train import train
from tests.methods import tiny

METHODS = [name for name in sorted(registry.names("algorithms")) if tiny(name).algorithm.name == name]
# Nothing to compare; a reward of its own; scores of steps, normalised step by step.
OTHERWISE = ("masked_sft", "vrpo", "unmasking_policy", "mdpo")


def rewards(components):
    """Of two groups of three rows."""
    values = {name: torch.tensor(value) for name, value in components.items()}
    made = cases.rewards([float(sum(parts)) for parts in zip(*components.values(), strict=True)])
    return dataclasses.replace(made, components=values)


@pytest.mark.parametrize("name", [name for name in METHODS if name not in OTHERWISE])
def test_every_method_of_groups_takes_the_sum_of_z_scores_as_it_is(name):
    """Dividing it once more would make groups of one right answer and of several rewards alike."""
    options = {"reward_weight": 1.0} if name == "opd" else {}  # its own is that of the teacher alone
    algorithm = build("algorithms", name, {**tiny(name).algorithm.options, **options})
    batch = cases.batch(block_causal=False)
    scored = rewards({"right": [1.0, 0, 0, 1, 0, 0], "formed": [0.0, 0, 0, 300, 100, 100]})
    apart = advantage.decoupled(scored, {}, batch)
    z = torch.tensor([2.0, -1, -1]) / 2**0.5
    torch.testing.assert_close(apart.total, torch.cat([z, 2 * z]))
    got = algorithm.advantages(apart, batch)
    flat = algorithm.advantages(dataclasses.replace(apart, total=torch.zeros(6)), batch)  # what else it rewards
    gain = got - flat
    if name == "wd1":  # softmax weights: the same, but not linear in the reward
        up, down = (3 * (sign * apart.total).view(2, 3).softmax(-1).flatten() for sign in (1, -1))
        torch.testing.assert_close(got, up - down)
        return
    scale = 1.5 if name in ("coupled_grpo", "espo") else 1.0  # the others' mean: G / (G - 1)
    torch.testing.assert_close(gain, scale * torch.cat([z, 2 * z]))


def configuration(folder, algorithm, **sections):
    return {
        "run": {"name": "run", "steps": 1, "output": str(folder), "threads": 1},
        "model": {"family": "tiny", "init": {"hidden_size": 32, "num_layers": 1, "max_length": 64}},
        "data": {
            "task": {"name": "sudoku4", "train_puzzles": 40, "test_puzzles": 20, "min_holes": 4, "max_holes": 6},
            "prompts_per_step": 4,
            "samples_per_prompt": 4,
        },
        "sampling": {"max_new_tokens": 16, "tokens_per_step": 4},
        "algorithm": algorithm,
        "rewards": [
            {"name": "sudoku", "mode": "cells"},
            {"name": "format", "pattern": "[12]$", "weight": 0.5},
            {"name": "length", "weight": 0},
        ],
        "evaluate": {"at_start": False, "at_end": False},
        "reward_normalisation": "decoupled",
    } | sections


def test_a_run_learns_from_decoupled_rewards_and_logs_those_that_were_given(tmp_path):
    found = []
    for how in ("decoupled", "total"):
        values = configuration(tmp_path, {"name": "diffu_grpo"}, reward_normalisation=how)
        config = validate(values)
        with build_run(config, tmp_path, Quiet()) as run, run.reward_pool:
            found.append(roll_out(run, config, run.source.batch(0), 0, Clock()))
    apart, plain = found
    assert apart.metrics == plain.metrics and apart.samples == plain.samples
    components, rows = plain.rewards.components, (plain.batch.group, plain.rewards.included, plain.batch.episode)
    want = sum(w * advantage.z_score(components[n], *rows) for n, w in (("sudoku", 1.0), ("format", 0.5)))
    torch.testing.assert_close(apart.rewards.total, want)
    assert want.abs().max() > 0 and apart.rewards.decoupled and not plain.rewards.decoupled


@pytest.mark.parametrize(
    ("algorithm", "why"),
    [
        ({"name": "vrpo"}, "trains on pairs"),
        ({"name": "masked_sft"}, "trains on demonstrations"),
        ({"name": "trace_rl", "value": True}, "has a value model"),
    ],
)
def test_methods_that_compare_nothing_refuse_it(tmp_path, algorithm, why):
    with pytest.raises(ValueError, match=f"reward_normalisation = decoupled .* algorithm '{algorithm['name']}' {why}"):
        train(validate(configuration(tmp_path, algorithm)))
