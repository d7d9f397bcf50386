"""The noise of likelihood estimates that every run reports."""

from __future__ import annotations

import json

import pytest
import torch

from dllm_rl import seeding
from dllm_rl.config.cluster import LearnerSection
from dllm_rl.config.plugins import build
from dllm_rl.config.schema import Config, DiagnosticsSection
from dllm_rl.conformance import cases
from dllm_rl.diffusion import likelihood
from dllm_rl.learner.diagnostics import estimator_metrics
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
