"""A reference that follows the policy, under DeepSpeed at every ZeRO stage: that of the torch learner."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from tests.learner.test_deepspeed import on_ranks
from tests.learner.test_moving_reference import Case, made, policy, scores, step


def on_deepspeed(case: Case, folder: Path):
    from dllm_rl.learner.deepspeed_learner import DeepSpeedLearner

    small = {"stage3_param_persistence_threshold": 0} if case.stage == 3 else {}
    return made(case, folder, DeepSpeedLearner, backend="deepspeed", zero_stage=case.stage, zero_options=small)


def state(learner, case):
    """Weights, and last the likelihoods under the reference of rows that are the same on every rank."""
    return [value.numpy() for value in policy(learner).values()] + [scores(learner, case).numpy()]


def train_and_resume(rank, size, chosen, folder, resumes):
    """State after 5 steps, and if wanted that of another learner that goes on from what was saved after 3."""
    out = []
    for number, case in enumerate(chosen):
        make, saved, found = (made if case.stage is None else on_deepspeed), folder / str(number), []
        for resumed in resumes:
            learner = make(case, folder)
            if resumed:
                learner.load(saved)
                assert learner.step == 3
            while learner.step < 5:
                step(learner, case, rank, size)
                if learner.step == 3 and not resumed:
                    learner.save(saved)
            found.append(state(learner, case))
        out.append(found)
    return out


def rank_case(stage, *, lora, updates=1):
    every = 2 * updates  # at steps 2 and 4: a step before the save, and one after it
    return Case(lora=lora, dtype=torch.float32, every=every, updates=updates, stage=stage, lr=5e-4)


def equals_the_torch_learner(case, got, folder):
    alone = dataclasses.replace(case, stage=None)
    (((*want, scored),),) = train_and_resume(0, 1, [alone], folder, [False])
    (still,) = train_and_resume(0, 1, [dataclasses.replace(alone, kind="frozen")], folder, [False])
    assert abs(scored - still[0][-1]).max() > 1e-3, "it has moved"
    assert max(abs(a - b).max() for a, b in zip(got, want, strict=False)) < 1e-6, f"{case}: the policy"
    assert abs(got[-1] - scored).max() < 2e-5, f"{case}: the reference"  # nats of a float32 network


def test_two_ranks_have_the_reference_of_the_torch_learner_and_resume_with_the_same_bits(tmp_path):
    chosen = [rank_case(2, lora=False), rank_case(3, lora=True)]
    for case, (whole, resumed) in zip(
        chosen, on_ranks(2, train_and_resume, chosen, tmp_path, [False, True]), strict=True
    ):
        equals_the_torch_learner(case, whole, tmp_path / "torch")
        assert all((a == b).all() for a, b in zip(whole, resumed, strict=True)), case


@pytest.mark.slow
def test_every_stage_has_it_with_several_updates(tmp_path):
    chosen = [rank_case(stage, lora=lora, updates=2) for lora in (False, True) for stage in (0, 1, 2, 3)]
    chosen = [dataclasses.replace(case, minibatches=2) if case.stage != 1 else case for case in chosen]
    found = on_ranks(2, train_and_resume, chosen, tmp_path, [False, True])
    for case, (whole, resumed) in zip(chosen, found, strict=True):
        equals_the_torch_learner(case, whole, tmp_path / "torch")
        assert all((a == b).all() for a, b in zip(whole, resumed, strict=True)), case


@pytest.mark.slow
def test_it_resumes_at_another_size(tmp_path):
    chosen = [rank_case(2, lora=False), rank_case(3, lora=True)]
    by_two = on_ranks(2, train_and_resume, chosen, tmp_path, [False])
    by_one = on_ranks(1, train_and_resume, chosen, tmp_path, [True])
    for case, (whole,), (alone,) in zip(chosen, by_two, by_one, strict=True):
        assert max(abs(a - b).max() for a, b in zip(whole[:-1], alone[:-1], strict=True)) < 1e-6, case
        assert abs(whole[-1] - alone[-1]).max() < 2e-5, case
