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
from dllm_rl.conformance import cases, engines
from dllm_rl.conformance.algorithms import Subject, learner_for
from dllm_rl.data.collate import collate
from dllm_rl.diffusion import likelihood
from dllm_rl.learner.diagnostics import advice, estimator_metrics, rollout_gap, rounding_noise
from dllm_rl.learner.torch_learner import TorchLearner
from dllm_rl.protocols.algorithm import Needs
from dllm_rl.train import train
from dllm_rl.types import Trajectory
from rollouts.native import NativeSampler


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


@pytest.mark.parametrize("family", ["tiny", "dream", "sdar"])
def test_engine_and_learner_agree_on_log_probabilities_and_a_difference_is_seen(family):
    denoiser = cases.denoiser(family)
    rows = engines.oracle(denoiser).generate(engines.PROMPTS, engines.SAMPLED, seed=4)
    batch = collate(rows, denoiser, group=list(range(len(rows))))
    made = learner_for(Needs(), batch, family)
    found = rollout_gap(made, batch, 6)
    assert found["rollout_gap"] <= found["rollout_gap_max"] < 2e-6
    with torch.no_grad():
        made.denoiser.module.get_output_embeddings().weight.mul_(1.01)
    assert rollout_gap(made, batch, 6)["rollout_gap"] > 1e-3


def window_replay(denoiser, row: Trajectory) -> torch.Tensor:
    """(L,) nats: the row's tokens block by block behind a cache, the kernels and the shapes of its decoding."""
    size, length = denoiser.block_size, len(row.tokens)
    begin = row.prompt_length // size * size if denoiser.block_origin == "sequence" else row.prompt_length
    block_ids, all_of_it = (torch.arange(begin) // size)[None], torch.ones(1, begin, dtype=torch.bool)
    cache = denoiser.prefill(row.tokens[None, :begin], all_of_it, block_ids)
    found = torch.zeros(length)
    for start in range(begin, length, size):
        position = torch.arange(start, start + size)[None]
        visible = position < length  # the last window may stick out past the canvas
        place = position.clamp(max=length - 1)[0]
        step = row.unmask_step[place].masked_fill(~visible[0], -1)
        for forward in sorted(set(step[(step >= 0) & (step < row.num_forwards)].tolist())):
            masked, chosen = step >= forward, step == forward
            window = torch.where(masked, denoiser.mask_id, row.tokens[place])[None]
            states = denoiser.extend(cache, window, position, visible, commit=False)
            with torch.no_grad():
                logits = denoiser.unembed(states[0, masked])
            logits = logits.index_fill(-1, torch.tensor([denoiser.mask_id]), float("-inf"))
            logp = logits - logits.logsumexp(-1, keepdim=True)
            found[place[chosen]] = logp[chosen[masked]].gather(-1, row.tokens[place[chosen], None]).squeeze(-1)
        denoiser.extend(cache, row.tokens[None, place], position, visible, commit=True)
    return found


def test_block_causal_rows_replayed_with_the_kernels_and_shapes_of_decoding_differ_by_nothing():
    """Equal bits, not a tolerance: the learner's packed replay differs in attention alone, by the order of its sums."""
    engine, learner = cases.denoiser("sdar"), cases.denoiser("sdar")
    sampler = NativeSampler(engine, build("strategies", "low_confidence", {}), weights=engines.WEIGHTS)
    rows = [sampler.generate([prompt], engines.SAMPLED, seed=4)[0] for prompt in engines.PROMPTS]
    generated = 0
    for row in rows:
        made = (row.unmask_step >= 0) & (row.unmask_step < row.num_forwards)
        assert torch.equal(window_replay(learner, row)[made], row.behaviour_logp[made])
        generated += int(made.sum())
    assert generated >= 24
    batch = collate(rows, learner, group=list(range(len(rows))))
    assert 0 < rollout_gap(learner_for(Needs(), batch, "sdar"), batch, 6)["rollout_gap_max"] < 2e-6  # another order
    with torch.no_grad():
        learner.module.get_output_embeddings().weight.view(torch.int32).add_(1)  # the next float up, or down
    assert not torch.equal(window_replay(learner, rows[0]), rows[0].behaviour_logp)
