"""What only some methods do: ask for more rollouts, take credit from a value model; and what a step makes of them."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from algorithms.coupled_grpo import CoupledGRPO
from algorithms.trace_rl import TraceRL
from algorithms.vrpo import VRPO
from dllm_rl.config.load import validate
from dllm_rl.conformance import cases
from dllm_rl.conformance.algorithms import learner_for
from dllm_rl.diffusion import masking, surrogate
from dllm_rl.learner.torch_learner import TorchLearner
from dllm_rl.models.loading import load_denoiser
from dllm_rl.protocols.algorithm import Algorithm, ExtraRollout, ExtraRollouts, Needs, ValueBaseline
from dllm_rl.seeding import generator_for
from dllm_rl.train import train
from dllm_rl.types import Loss, TrainingBatch
from rollouts.native import NativeEngine

SEEN: list = []  # what the methods here were given


@pytest.fixture(autouse=True)
def seen():
    SEEN.clear()
    return SEEN


class OneMore(CoupledGRPO):
    """Decodes the first prompt once more, and learns from that row and the other prompts'."""

    def extra_rollouts(self, prompts, rewards, batch, *, canvas, generator):
        again = dataclasses.replace(prompts[0], uid=f"{prompts[0].uid}#again")
        return [ExtraRollout(group=0, prompt=again)]

    def select_rows(self, extra, rewards, batch, generator):
        return (extra | (batch.group > 0)).nonzero().flatten()

    def advantages(self, rewards, batch):
        SEEN.append((len(batch), batch.group.tolist()))
        return torch.linspace(-1, 1, len(batch))


class Baseline(Algorithm):
    """Rewards minus what the value model expects, token by token."""

    value_clip = 0.2

    @property
    def needs(self):
        return Needs(values=True, group_size=1)

    def advantages(self, rewards, batch):
        return torch.full((len(batch),), float("nan"))  # never read

    def credit(self, rewards, batch, value):
        SEEN.append(("value", value.clone()))
        target = rewards.total[:, None] * batch.completion
        return target - value, target

    def masks(self, batch, generator, update=0):
        return masking.fully_masked(batch.completion).also_masking(batch.tail)

    def loss(self, new, experience):
        SEEN.append(("advantage", experience.advantage.clone()))
        value = surrogate.clipped_loss(new, experience, epsilon=0.2, beta=0.0, reduction="token_mean").value
        return Loss(value)


class BelievesTheEngine(TraceRL):
    """Its old policy is what the engine recorded."""

    @property
    def needs(self):
        return Needs(trajectory=True, behaviour_logp=True)

    def loss(self, new, experience):
        batch = experience.batch
        SEEN.append((batch.behaviour_logp[batch.generated], experience.old.token_logp[batch.generated]))
        SEEN.append(experience.advantage)
        old = dataclasses.replace(experience.old, token_logp=batch.behaviour_logp)
        return super().loss(new, dataclasses.replace(experience, old=old))


class Careless(TraceRL):
    """The same method without reading them."""

    def loss(self, new, experience):
        SEEN.append(experience.advantage)
        return super().loss(new, experience)


class FreshPairs(VRPO):
    """VRPO whose updates draw their own masks."""

    @property
    def needs(self):
        return dataclasses.replace(super().needs, fresh_masks=True)


class Joint(Algorithm):
    """REINFORCE on tokens and on choices."""

    @property
    def needs(self):
        return Needs(trains=frozenset({"model", "policy"}), trajectory=True)

    def advantages(self, rewards, batch):
        return torch.linspace(-1, 1, len(batch))

    def masks(self, batch, generator, update=0):
        return masking.along_trajectory(batch.unmask_step, batch.generated, block_ids=batch.block_ids)

    def loss(self, new, experience):
        weight = experience.advantage[:, None]
        tokens = (
            torch.where(experience.batch.completion, weight * new.token_logp, 0.0).sum() / experience.counts.num_tokens
        )
        return Loss(-tokens - (weight * new.choice_logp).sum() / experience.counts.num_choices)


class Approximate(NativeEngine):
    """Says that its log-probabilities are off, and they are."""

    def generate(self, *arguments, **options):
        rows = super().generate(*arguments, **options)
        return [dataclasses.replace(t, behaviour_logp=1.5 * t.behaviour_logp, exact=False) for t in rows]


def config(tmp_path, method, name="run", **more):
    base = {
        "run": {"name": name, "steps": 2, "output": str(tmp_path), "threads": 1},
        "model": {"family": "tiny", "init": {"hidden_size": 32, "num_layers": 1, "num_heads": 4, "max_length": 40}},
        "data": {"task": {"name": "sudoku4", "train_puzzles": 16, "test_puzzles": 4}, "prompts_per_step": 2}
        | {"samples_per_prompt": 3},
        "sampling": {"max_new_tokens": 16, "tokens_per_step": 4},
        "algorithm": {"name": f"{__name__}:{method}"},
        "rewards": [{"name": "sudoku", "mode": "cells"}],
        "learner": {"lr": 1e-3},
        "evaluate": {"limit": 4, "at_start": False, "at_end": False},
    }
    return validate(base | more)


def rows(summary):
    return [json.loads(line) for line in (summary.folder / "metrics.jsonl").read_text().splitlines()]


def test_protocols_are_seen_on_the_methods_that_have_them():
    assert issubclass(OneMore, ExtraRollouts) and not issubclass(CoupledGRPO, ExtraRollouts)
    assert isinstance(Baseline(Baseline.Config()), ValueBaseline)
    assert not isinstance(CoupledGRPO(CoupledGRPO.Config()), ValueBaseline)


def test_extra_rollouts_join_the_batch(tmp_path):
    summary = train(config(tmp_path, "OneMore"))
    assert SEEN == [(4, [1, 1, 1, 0])] * 2, "one further row of prompt 0 in the place of its three"
    assert any(name.startswith("guided/") for name in rows(summary)[0])


def test_a_value_baseline_replaces_the_advantages(tmp_path):
    summary = train(config(tmp_path, "Baseline"))
    values = [value for kind, value in SEEN if kind == "value"]
    used = [value for kind, value in SEEN if kind == "advantage"]
    assert len(values) == len(used) == 2 and all(bool(torch.isfinite(value).all()) for value in used)
    assert all("value_loss" in row for row in rows(summary) if "loss" in row)
    assert (summary.folder / "checkpoints/step-000002/values.pt").is_file()
    with pytest.raises(ValueError, match=r"correction = token: .* advantages from a value model of algorithm"):
        train(config(tmp_path, "Baseline", "other", rollout={"correction": "token"}))


def test_values_and_entropies_are_those_of_each_updates_masks():
    class Two(Baseline):
        needs = Needs(values=True, entropy=True, fresh_masks=True)

        def loss(self, new, experience):
            scored = experience.masks.weight.sum(0) != 0
            SEEN.append((scored, experience.advantage != 0, experience.entropy != 0))
            return Loss((torch.where(scored, new.token_logp, 0.0)).sum())

        def credit(self, rewards, batch, value):
            return (value != 0).float(), value

    algorithm, batch = Two(Two.Config()), cases.batch(block_causal=False)
    one = learner_for(algorithm.needs, batch, "tiny", updates_per_step=2)
    torch.nn.init.ones_(one._values._head.weight)
    masks = [masking.bernoulli(batch.completion, generator=generator_for(number)) for number in range(2)]
    assert not torch.equal(masks[0].weight, masks[1].weight)
    one.update(TrainingBatch(batch, cases.rewards(cases.MIXED), torch.zeros(6), masks), algorithm)
    for scored, credited, entropic in SEEN:
        assert torch.equal(scored, credited) and torch.equal(scored, entropic)
    assert not torch.equal(SEEN[0][0], SEEN[1][0])


def test_approximate_log_probabilities_are_refused_where_they_pass_for_the_learners(tmp_path):
    engine = {"name": f"{__name__}:Approximate"}
    with pytest.raises(ValueError, match=r"approximate; set rollout\.correction to token or sequence"):
        train(config(tmp_path, "BelievesTheEngine", engine=engine))
    train(config(tmp_path, "BelievesTheEngine", "exact"))
    train(config(tmp_path, "Careless", "careless", engine=engine))


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_approximate_rollouts_are_corrected_when_asked(tmp_path, level):
    engine, rollout = {"name": f"{__name__}:Approximate"}, {"correction": level}
    summary = train(config(tmp_path, "BelievesTheEngine", engine=engine, rollout=rollout))
    for behaviour, old in SEEN[::2]:
        torch.testing.assert_close(behaviour, old, atol=1e-5, rtol=0)
    assert all(row["stale_ratio"] > 1 for row in rows(summary) if "loss" in row), "p_now > p_recorded, by 1.5 in logs"
    assert SEEN[1].dim() == (2 if level == "token" else 1)
    SEEN.clear()
    exact = train(config(tmp_path, "Careless", "exact", rollout=rollout))
    assert not any("stale_ratio" in row for row in rows(exact)), "fresh and exact: nothing to correct"


@pytest.fixture
def scored(monkeypatch):
    """The steps at which the reference was scored."""
    calls, score = [], TorchLearner.score

    def counted(self, batch, masks, **options):
        if options.get("reference"):
            calls.append(self.step)
        return score(self, batch, masks, **options)

    monkeypatch.setattr(TorchLearner, "score", counted)
    return calls


def test_references_of_fresh_masks_can_be_precomputed(tmp_path, scored):
    ends = []
    for name, beforehand in (("way", False), ("before", True)):
        scored.clear()
        learner = {"lr": 1e-2, "updates_per_step": 3, "precompute_reference": beforehand}
        folder = train(config(tmp_path, "FreshPairs", name, learner=learner)).folder
        assert scored == ([0] * 6 if beforehand else [0, 0, 0, 1, 1, 1])
        model, _ = load_denoiser(folder / "checkpoints/step-000002/model", family="tiny")
        ends.append(dict(model.module.named_parameters()))
    assert len(list((tmp_path / "before" / "reference").glob("*.pt"))) == 6
    for name, value in ends[0].items():
        assert torch.equal(value, ends[1][name]), name


def test_a_joint_run_trains_both_and_resumes_to_the_same_bits(tmp_path):
    sampling = {"max_new_tokens": 16, "strategy": {"name": "learned", "width": 16}}
    checkpoint = {"every_steps": 1, "keep": 9}
    made = config(tmp_path, "Joint", sampling=sampling, checkpoint=checkpoint)
    folder = train(made).folder / "checkpoints"
    ends = {}
    for attempt in ("whole", "resumed"):
        first, last = (folder / f"step-00000{step}" for step in (1, 2))
        for part in ("model/model.safetensors", "policy/policy.safetensors"):
            ends[attempt, part] = (last / part).read_bytes()
            assert (first / part).read_bytes() != ends[attempt, part], f"{part} did not move"
        if attempt == "whole":
            train(made, from_checkpoint="step-000001")
    assert all(ends["whole", part] == ends["resumed", part] for _, part in ends)
    with pytest.raises(ValueError, match=r"correction = token: .* choices of positions"):
        train(config(tmp_path, "Joint", "other", sampling=sampling, rollout={"correction": "token"}))
    deepspeed = {"backend": "deepspeed"}
    with pytest.raises(ValueError, match="trains an unmasking policy, which runs on one rank"):
        train(config(tmp_path, "Joint", "ranks", sampling=sampling, learner=deepspeed))
