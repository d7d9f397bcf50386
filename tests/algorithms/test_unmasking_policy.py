"""Learned unmasking: the learner scores what the engine did, the policy travels as a file, experts join in."""

from __future__ import annotations

import dataclasses
import math
import shutil
import tempfile
from pathlib import Path

import pytest
import torch

from dllm_rl.config.cluster import LearnerSection
from dllm_rl.config.plugins import build
from dllm_rl.config.schema import Config
from dllm_rl.conformance import cases
from dllm_rl.conformance.algorithms import Subject
from dllm_rl.data.collate import collate
from dllm_rl.diffusion import advantage
from dllm_rl.learner.policy_scorer import PolicyScorer
from dllm_rl.learner.torch_learner import TorchLearner
from dllm_rl.protocols.algorithm import Needs
from dllm_rl.protocols.strategy import UnmaskingStrategy
from dllm_rl.seeding import generator_for
from dllm_rl.train import train
from dllm_rl.types import Prompt, Sampling, TrainingBatch, WeightsVersion
from rollouts.native import NativeSampler
from rollouts.policy_network import UnmaskingPolicy, load_policy, save_policy
from rollouts.reference import ReferenceSampler

WEIGHTS = WeightsVersion(step=0, digest="x")
MODELS = {
    "full": ("tiny", {}, None),
    "full, blocks of 4": ("tiny", {}, 4),
    "causal blocks, response": ("sdar", {"block_origin": "response"}, None),
    "causal blocks, sequence": ("sdar", {"block_origin": "sequence"}, None),
}


def learned(**options) -> UnmaskingStrategy:
    """A policy whose every weight counts, unlike the untrained one's."""
    strategy = build("strategies", "learned", {"width": 16} | options)
    generator = generator_for(1, "policy")
    with torch.no_grad():
        for parameter in strategy.policy.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return strategy


class Spy(UnmaskingStrategy):
    """Passes on, and keeps the log-probability that each choice had when it was made."""

    reads_canvas = True

    def __init__(self, inner):
        self.inner, self.logp = inner, []

    def select(self, candidates):
        order = self.inner.select(candidates)
        numbers = order if order.dtype == torch.int64 else order.cumsum(-1) * order
        with torch.no_grad():
            self.logp.append(self.inner.log_prob(candidates, numbers))
        return order


def prompts_of(denoiser, lengths=(3, 6, 1, 5)):
    return [
        Prompt(
            uid=f"p{row}",
            token_ids=tuple(3 + (row * 7 + i * 5) % (denoiser.vocab_size - 3) for i in range(length)),
            text="",
            answer="",
            task="t",
            injected={2: 5} if row % 2 else {},
        )
        for row, length in enumerate(lengths)
    ]


def learner_for(strategy, denoiser, sampling, **settings):
    config = LearnerSection(**{"lr": 1e-2, "tokens_per_microbatch": 64} | settings)
    policy = PolicyScorer(
        strategy,
        config.tokens_per_microbatch,
        block_size=denoiser.block_size or sampling.block_size or sampling.max_new_tokens,
        block_origin=denoiser.block_origin if denoiser.block_size else "response",
        sees_block_only=denoiser.block_size is not None,
    )
    return TorchLearner(
        denoiser,
        None,
        config,
        Needs(trains=frozenset({"policy"})),
        total_steps=4,
        seed=0,
        policy=policy,
        dump_folder=Path(tempfile.gettempdir()),
    )


def rollouts(denoiser, strategy, sampling, engine=NativeSampler, samples=2):
    trajectories = engine(denoiser, strategy, weights=WEIGHTS).generate(
        prompts_of(denoiser), sampling, seed=3, samples_per_prompt=samples
    )
    batch = collate(trajectories, denoiser, group=[i // samples for i in range(len(trajectories))])
    return trajectories, batch


@pytest.mark.parametrize("distribution", ["bernoulli", "plackett_luce", "ranking"])
@pytest.mark.parametrize("model", MODELS)
def test_the_learner_scores_what_the_engine_did(tiny_denoiser, model, distribution):
    family, options, block = MODELS[model]
    denoiser = tiny_denoiser(family, **options)
    strategy = learned(distribution=distribution, temperature=0.8, bias=0.5)
    sampling = Sampling(max_new_tokens=12, temperature=0.0, block_size=block, tokens_per_step=2)
    spy = Spy(strategy)
    one_row = collate_one(denoiser, spy, sampling)
    for batch, choices in one_row:
        scored = learner_for(strategy, denoiser, sampling).score(batch, None).choice_logp[0]
        torch.testing.assert_close(scored, torch.cat(choices), atol=1e-4, rtol=0)
        assert len(scored) == int(batch.num_forwards[0]) and float(scored.min()) < -0.1


def collate_one(denoiser, spy, sampling):
    """Rows decoded one at a time, each with the log-probabilities of its choices."""
    for prompt in prompts_of(denoiser):
        spy.logp = []
        (trajectory,) = ReferenceSampler(denoiser, spy, weights=WEIGHTS).generate([prompt], sampling, seed=3)
        batch = collate([trajectory], denoiser, group=[0])
        yield batch, spy.logp


@pytest.mark.parametrize("distribution", ["bernoulli", "plackett_luce"])
@pytest.mark.parametrize("model", MODELS)
def test_native_decodes_like_the_oracle(tiny_denoiser, model, distribution):
    family, options, block = MODELS[model]
    denoiser = tiny_denoiser(family, **options)
    strategy = learned(distribution=distribution)
    sampling = Sampling(max_new_tokens=12, temperature=0.0, block_size=block)
    fast, _ = rollouts(denoiser, strategy, sampling)
    slow, _ = rollouts(denoiser, strategy, sampling, ReferenceSampler)
    for a, b in zip(fast, slow, strict=True):
        assert torch.equal(a.tokens, b.tokens) and torch.equal(a.unmask_step, b.unmask_step)
        assert torch.equal(a.order, b.order) and torch.equal(a.events, b.events)
        torch.testing.assert_close(a.confidence, b.confidence, atol=1e-5, rtol=0)
    assert len({t.num_forwards for t in fast}) > 1, "every row took equally many forwards: nothing was tested"


def test_update_has_the_gradient_of_one_graph_whatever_the_micro_batches(tiny_denoiser):
    denoiser = tiny_denoiser("tiny")
    sampling = Sampling(max_new_tokens=12, temperature=0.0)
    algorithm = build("algorithms", "unmasking_policy", {})
    gradients = []
    for budget in (64, 1 << 16):
        strategy = learned()
        _, batch = rollouts(denoiser, strategy, sampling)
        scored = cases.rewards([1.0, 0.0] * 4)
        learner = learner_for(strategy, denoiser, sampling, tokens_per_microbatch=budget, max_grad_norm=None)
        weight = algorithm.advantages(scored, batch)
        learner.update(TrainingBatch(batch, scored, weight, [None]), algorithm)
        gradients.append(torch.cat([p.grad.flatten() for p in strategy.policy.parameters() if p.grad is not None]))
    strategy = learned()
    learner = learner_for(strategy, denoiser, sampling)
    happened = torch.arange(int(batch.num_forwards.max())) < batch.num_forwards[:, None]
    row, forward = happened.nonzero(as_tuple=True)
    logp = learner._scorers["model"]._log_prob(batch, row, forward)
    loss = -(logp * weight[row] / batch.num_forwards[row]).sum() / len(batch)  # REINFORCE, mean over forwards
    want = torch.autograd.grad(loss, [p for p in strategy.policy.parameters()], allow_unused=True)
    want = torch.cat([g.flatten() for g in want if g is not None])
    for got in gradients:
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-4)


def test_reward_is_right_and_fast():
    """Canvas 8, 4 forwards: speed (8 - 4 + 1)/8; one row has 8 forwards: 1/8."""
    batch = cases.batch(block_causal=False)
    batch = dataclasses.replace(batch, num_forwards=torch.tensor([4, 8, 4, 4, 4, 4]))
    scored = cases.rewards([1.0, 1.0, 0.0, 1.0, 0.0, 0.0])
    algorithm = build("algorithms", "unmasking_policy", {"alpha": 2.0})
    value = torch.tensor([(5 / 8) ** 2, (1 / 8) ** 2, 0.0, (5 / 8) ** 2, 0.0, 0.0])
    mean = torch.tensor([value[:3].mean()] * 3 + [value[3:].mean()] * 3)
    torch.testing.assert_close(algorithm.advantages(scored, batch), value - mean)


def test_gradient_by_hand_without_and_with_experts():
    """-A / (T N) per forward; an expert's row, of 1 in 3, shrinks by its share of the mixture."""
    for options, expert in (({}, None), ({"experts": [0.9]}, torch.tensor([False, False, True] * 2))):
        subject = Subject("unmasking_policy", options)
        batch = dataclasses.replace(subject.batch(False), expert=expert)
        experience = dataclasses.replace(subject.experience(batch), batch=batch)
        _, gradient = subject.gradient(experience, experience.old)
        for row in range(6):
            want = -experience.advantage[row].double() / (4 * 6)
            share = torch.ones(4, dtype=torch.float64)
            if expert is not None and expert[row]:
                policy = math.log(2 / 3) + experience.old.choice_logp[row]
                share = (policy - torch.logaddexp(policy, torch.tensor(math.log(1 / 3)))).exp()
            torch.testing.assert_close(gradient[row], want * share)


def test_ratio_of_an_expert_is_bounded_where_the_policy_never_goes():
    subject = Subject("unmasking_policy", {"experts": [0.9], "epsilon": 1e9})
    batch = dataclasses.replace(subject.batch(False), expert=torch.tensor([False, False, True] * 2))
    experience = subject.experience(batch)
    far = torch.full((6, 4), -200.0, dtype=torch.float64)
    old = dataclasses.replace(experience.old, choice_logp=far)
    at = dataclasses.replace(experience, batch=batch, old=old)
    near = dataclasses.replace(old, choice_logp=torch.zeros_like(far))
    rows = torch.tensor([2, 5])
    kept = dataclasses.replace(at, batch=batch.select(rows), advantage=at.advantage[rows], old=at.old.select(rows))
    metrics = subject.algorithm.loss(near.select(rows), kept).metrics
    assert float(metrics["ratio_mean"]) < 3.0


def config(tmp_path, **more):
    base = {
        "run": {"name": "run", "steps": 4, "output": str(tmp_path), "threads": 1},
        "model": {"family": "tiny", "init": {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "max_length": 48}},
        "data": {"task": {"name": "sudoku4"}, "prompts_per_step": 2, "samples_per_prompt": 3},
        "sampling": {"max_new_tokens": 16, "temperature": 0.0, "strategy": {"name": "learned", "width": 16}},
        "algorithm": {"name": "unmasking_policy", "experts": [0.5, 0.9], "expert_block_size": 4},
        "rewards": [{"name": "sudoku"}],
        "learner": {"lr": 1e-2},
        "evaluate": {"limit": 8, "at_start": False},
        "checkpoint": {"every_steps": 2},
    }
    return Config.model_validate(base | more)


def test_a_run_resumes_to_the_same_bits_and_its_policy_is_a_strategy(tmp_path, monkeypatch):
    # A random model solves nothing: let speed alone count, so that there is something to learn.
    monkeypatch.setattr("algorithms.unmasking_policy.UnmaskingPolicy.advantages", by_speed)
    whole = train(config(tmp_path))
    end = whole.folder / "checkpoints/step-000004"
    first, last = (whole.folder / f"checkpoints/step-00000{step}/model" for step in (2, 4))
    weights, about = load_policy(last)
    weights = weights.state_dict()
    assert any(not torch.equal(load_policy(first)[0].state_dict()[name], value) for name, value in weights.items())
    assert about["distribution"] == "bernoulli" and len(about["vocabulary"]) == 8
    shutil.rmtree(end)
    train(config(tmp_path), from_checkpoint="step-000002")
    for name, value in load_policy(last)[0].state_dict().items():
        assert torch.equal(weights[name], value), name
    run = {"name": "other", "steps": 1, "output": str(tmp_path), "threads": 1}
    used = {"limit": 8, "at_start": False, "strategy": {"name": "learned", "path": str(last)}}
    other = config(tmp_path, algorithm={"name": "masked_sft"}, run=run, evaluate=used, sampling={"max_new_tokens": 16})
    assert train(other).after[0].tokens_per_forward > 1.0


def by_speed(self, rewards, batch):
    return advantage.group_mean(-batch.num_forwards.float(), batch.group, rewards.included)


def test_policies_survive_the_disk(tmp_path):
    policy = UnmaskingPolicy(width=16, heads=2, seed=4)
    save_policy(policy, tmp_path, {"vocabulary": "abc"})
    again, about = load_policy(tmp_path / "policy.safetensors")
    assert about == {"vocabulary": "abc"} and again.width == 16
    for name, value in policy.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])


def test_the_untrained_policy_is_slow_and_deterministic():
    one, two = (UnmaskingPolicy(seed=0) for _ in range(2))
    inputs = torch.rand(3, 8), torch.ones(3, 8).bool(), torch.ones(3, 8).bool(), torch.rand(3)
    with torch.no_grad():
        assert torch.equal(one(*inputs), two(*inputs))
        assert float(one(*inputs).sigmoid().mean()) < 0.3
    assert 150_000 < sum(p.numel() for p in one.parameters()) < 400_000


def test_the_context_is_all_that_a_position_sees():
    strategy = learned()
    confidence, hidden = torch.rand(1, 6), torch.ones(1, 6).bool()
    context = torch.tensor([[True, True, True, True, False, False]])
    time = torch.tensor([0.3])
    with torch.no_grad():
        whole = strategy.policy(confidence, hidden, context, time)[:, :4]
        other = torch.where(context, confidence, 0.123)
        torch.testing.assert_close(strategy.policy(other, hidden & context, context, time)[:, :4], whole)
        torch.testing.assert_close(strategy.policy(confidence[:, :4], hidden[:, :4], context[:, :4], time), whole)
        changed = confidence.clone()
        changed[0, 3] = 1 - changed[0, 3]
        assert not torch.allclose(strategy.policy(changed, hidden, context, time)[:, 0], whole[:, 0])
        assert not torch.allclose(strategy.policy(confidence, hidden, context, time + 0.5)[:, :4], whole)
