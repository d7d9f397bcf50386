"""The value model: it learns the rewards of the states it is shown, and survives a checkpoint."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from dllm_rl import seeding
from dllm_rl.config.cluster import LearnerSection
from dllm_rl.config.plugins import build
from dllm_rl.conformance import cases
from dllm_rl.learner.torch_learner import TorchLearner
from dllm_rl.models.tokenizers import character_tokenizer
from dllm_rl.protocols.algorithm import Needs
from dllm_rl.types import TrainingBatch


def learner(tmp_path, family="tiny", **settings):
    return TorchLearner(
        cases.denoiser(family),
        None,
        LearnerSection(**{"lr": 1e-9, "value_lr": 3e-3, "schedule": "constant"} | settings),
        Needs(values=True),
        total_steps=100,
        seed=0,
        dump_folder=tmp_path,
    )


def step(one, algorithm, batch, rewards):
    masks = algorithm.masks(batch, seeding.generator_for(0))
    return one.update(TrainingBatch(batch, rewards, algorithm.advantages(rewards, batch), [masks]), algorithm)


@pytest.mark.parametrize(("family", "blocks"), [("tiny", False), ("sdar", True)])
def test_it_learns_the_rewards(tmp_path, family, blocks):
    algorithm, batch = (
        build("algorithms", "trace_rl", {"value": True, "clip_value": 10.0}),
        cases.batch(block_causal=blocks),
    )
    scored, one = cases.rewards(cases.MIXED), learner(tmp_path, family)
    losses = [step(one, algorithm, batch, scored)["value_loss"] for _ in range(60)]
    generated = batch.generated
    want = (scored.total.square() * generated.sum(-1)).sum() / generated.sum() / 2  # the head starts at 0
    assert losses[0] == pytest.approx(want.item(), rel=1e-5)
    assert losses[-1] < 0.1 * losses[0]
    masks = algorithm.masks(batch, seeding.generator_for(0))
    value = one._values.predict(batch, masks)
    assert not value[~generated].any()
    for row in (0, 1):
        assert value[row][generated[row]].mean().item() == pytest.approx(cases.MIXED[row], abs=0.2)


def test_micro_batches_do_not_matter(tmp_path):
    algorithm, batch = build("algorithms", "trace_rl", {"value": True}), cases.batch(block_causal=False)
    heads = []
    for budget in (1 << 14, 24):
        one = learner(tmp_path, tokens_per_microbatch=budget)
        for _ in range(2):
            step(one, algorithm, batch, cases.rewards(cases.MIXED))
        heads.append(one._values._head.weight.detach().clone())
    torch.testing.assert_close(heads[0], heads[1], atol=1e-6, rtol=1e-4)


def test_advantages_come_from_the_predictions(tmp_path, monkeypatch):
    """All rewards equal: the group says nothing, the value model (0 at first) says that every token was good."""
    algorithm, batch = build("algorithms", "trace_rl", {"value": True}), cases.batch(block_causal=False)
    seen = {}
    loss = type(algorithm).loss
    monkeypatch.setattr(type(algorithm), "loss", lambda self, new, e: seen.update(a=e.advantage) or loss(self, new, e))
    metrics = step(learner(tmp_path), algorithm, batch, cases.rewards([1.0] * 6))
    assert torch.equal(seen["a"], batch.generated.float()) and metrics["grad_norm"] > 0


def test_checkpoints_hold_it(tmp_path):
    algorithm, batch = build("algorithms", "trace_rl", {"value": True}), cases.batch(block_causal=False)
    scored, ends = cases.rewards(cases.MIXED), []
    whole = learner(tmp_path)
    step(whole, algorithm, batch, scored)
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    whole._model._tokenizer = character_tokenizer("0123456789")
    whole.save(folder)
    again = learner(tmp_path)
    again.load(folder)
    for one in (whole, again):
        ends.append(dataclasses.asdict(one.version()) | step(one, algorithm, batch, scored))
    assert ends[0] == ends[1]
    assert torch.equal(whole._values._head.weight, again._values._head.weight)
