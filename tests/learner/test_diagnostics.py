"""The noise of likelihood estimates that every run reports."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from dllm_rl import seeding
from dllm_rl.config.cluster import LearnerSection
from dllm_rl.config.plugins import build
from dllm_rl.config.schema import Config, DiagnosticsSection
from dllm_rl.conformance import cases
from dllm_rl.conformance.algorithms import Subject, learner_for
from dllm_rl.diffusion import likelihood
from dllm_rl.learner.diagnostics import advice, estimator_metrics, rounding_noise
from dllm_rl.learner.torch_learner import TorchLearner
from dllm_rl.protocols.algorithm import Needs
from dllm_rl.train import train


def learner(tmp_path):
    return TorchLearner(
        cases.denoiser("tiny"),
        None,
        LearnerSection(),
        Needs(),
        total_steps=1,
        seed=0,
        dump_folder=tmp_path,
    )


def test_deviation_by_hand(tmp_path):
    algorithm, batch = build("algorithms", "coupled_grpo", {}), cases.batch(block_causal=False)
    settings = DiagnosticsSection(rows=3, redraws=5)
    one = learner(tmp_path)
    found = estimator_metrics(one, algorithm, batch, settings, seed=7)
    few = batch.select(torch.arange(3))
    values = []
    for number in range(5):
        generator = torch.Generator().manual_seed(seeding.derive(7, "redraw", number))
        values.append(likelihood.estimate(one.denoiser, few, algorithm.masks(few, generator)).token_logp.sum(-1))
    variance = torch.stack(values).double().var(0)
    assert found["estimate_deviation"] == pytest.approx(variance.mean().sqrt().item())
    per_token = (variance / torch.tensor([8.0, 5.0, 8.0]) ** 2).mean().sqrt().item()
    assert found["estimate_deviation_per_token"] == pytest.approx(per_token)


def test_trajectories_have_no_noise_and_policies_no_estimate(tmp_path):
    batch, settings = cases.batch(block_causal=False), DiagnosticsSection()
    exact = estimator_metrics(learner(tmp_path), build("algorithms", "trace_rl", {}), batch, settings, seed=0)
    assert exact == {"estimate_deviation": 0.0, "estimate_deviation_per_token": 0.0}
    assert estimator_metrics(None, build("algorithms", "unmasking_policy", {}), batch, settings, seed=0) == {}


def test_a_run_reports_it_when_asked(tmp_path):
    config = {
        "run": {"name": "run", "steps": 4, "output": str(tmp_path), "threads": 1},
        "model": {"family": "tiny", "init": {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "max_length": 40}},
        "data": {"task": {"name": "sudoku4", "train_puzzles": 8, "test_puzzles": 4}, "prompts_per_step": 2},
        "sampling": {"max_new_tokens": 16, "tokens_per_step": 4},
        "algorithm": {"name": "espo"},
        "evaluate": {"at_start": False, "at_end": False},
        "diagnostics": {"every_steps": 2, "rows": 2, "redraws": 3},
    }
    folder = train(Config.model_validate(config)).folder
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row.get("estimate_deviation", 0) > 0] == [1, 3]
    wanted = {"effective_samples", "log_ratio_deviation", "clip_fraction", "zero_variance_groups"}
    assert all(wanted <= set(row) for row in rows)


class Rounds:
    """Scores as a network whose products round by how many rows there are: off by 0.01 nats a row where it is alone."""

    def __init__(self, made):
        self.made = made

    def score(self, batch, masks):
        found = self.made.score(batch, masks)
        off = torch.zeros_like(found.token_logp)
        off[:, -1] = 0.01 if len(batch) == 1 else 0.0
        return dataclasses.replace(found, token_logp=found.token_logp + off)


def test_what_rounding_does_is_measured_and_told_if_the_clip_is_below_it():
    subject = Subject("espo", {})
    batch = subject.batch(False)
    made = learner_for(subject.needs, batch, "tiny")
    assert rounding_noise(made, subject.algorithm, batch, 4, seed=0) < 1e-6
    noise = rounding_noise(Rounds(made), subject.algorithm, batch, 4, seed=0)
    length = batch.completion[:4].sum(-1)
    assert noise == pytest.approx((0.01 / length).square().mean().sqrt().item(), rel=1e-3)
    assert advice({"ratio_noise": 1e-4}, subject.algorithm) == "" == advice({}, subject.algorithm)
    told = advice({"ratio_noise": noise}, subject.algorithm)
    assert "more than the clip of 4.0e-04" in told and "model.dtype: float32" in told


def test_a_run_in_bfloat16_measures_it_once(tmp_path):
    values = {
        "run": {"name": "run", "steps": 2, "output": str(tmp_path), "threads": 1},
        "model": {
            "family": "tiny",
            "init": {"hidden_size": 32, "num_layers": 1, "num_heads": 4, "max_length": 40},
            "dtype": "bfloat16",
        },
        "data": {"task": {"name": "sudoku4", "train_puzzles": 20, "test_puzzles": 10}, "prompts_per_step": 2},
        "sampling": {"max_new_tokens": 16, "tokens_per_step": 4},
        "algorithm": {"name": "espo"},
        "rewards": [{"name": "sudoku", "mode": "cells"}],
        "reward_pool": {"self_test": 0},
        "evaluate": {"at_start": False, "at_end": False},
    }
    folder = train(Config.model_validate(values)).folder
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert ["ratio_noise" in row for row in rows] == [True, False]
