"""What a loss may read beside the weighted sum: draws, fresh masks, advantages per draw, a policy trained jointly."""

from __future__ import annotations

import copy
import dataclasses
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from algorithms.coupled_grpo import CoupledGRPO
from dllm_rl.config.cluster import LearnerSection
from dllm_rl.config.plugins import build
from dllm_rl.conformance import cases
from dllm_rl.conformance.algorithms import learner_for
from dllm_rl.conformance.suite import check_plugin
from dllm_rl.diffusion import advantage, likelihood, masking, surrogate
from dllm_rl.driver.learner_group import deal
from dllm_rl.learner.torch_learner import TorchLearner
from dllm_rl.models.tokenizers import character_tokenizer
from dllm_rl.protocols.algorithm import Algorithm, Needs
from dllm_rl.seeding import generator_for
from dllm_rl.types import LikelihoodEstimate, Loss, TrainingBatch, rows_of
from tests.learner.test_deepspeed import on_ranks, weights

ATOL_F64 = 1e-10
BUDGETS = (1 << 14, 60, 1)  # tokens: one micro-batch, several, one per copy


class LogSumOverDraws(Algorithm):
    """Rows of positive advantage climb their lower bound, the others descend an upper one over the draws (SPG)."""

    @property
    def needs(self):
        return Needs(old=False, draws=True, row_credit=True)

    def advantages(self, rewards, batch):
        return advantage.leave_one_out(rewards.total, batch.group, rewards.included)

    def masks(self, batch, generator, update=0):
        sample = masking.complementary_count(batch.completion, pairs=2, generator=generator)
        return sample.also_masking(batch.tail)

    def loss(self, new, experience):
        lower = surrogate.sequence_logp(new, experience)
        upper = new.draw_token_logp.sum(-1).logsumexp(0)
        value = experience.advantage * torch.where(experience.advantage > 0, lower, upper)
        return Loss(-value.sum() / experience.counts.num_rows)


class PerDraw(LogSumOverDraws):
    """Every draw of every token has an advantage of its own, and a ratio."""

    @property
    def needs(self):
        return dataclasses.replace(super().needs, old=True)

    def advantages(self, rewards, batch):
        row = super().advantages(rewards, batch)
        scale = 1 + torch.arange(4)[:, None, None] + torch.arange(batch.tokens.shape[1]) / 10
        return row[:, None] * scale

    def loss(self, new, experience):
        ratio = (new.draw_token_logp - experience.old.draw_token_logp).exp()
        gain = experience.masks.weight * experience.advantage * ratio
        return Loss(-gain.sum() / experience.counts.num_tokens)


class Fresh(CoupledGRPO):
    """Coupled-GRPO whose updates draw their own masks."""

    @property
    def needs(self):
        return dataclasses.replace(super().needs, fresh_masks=True)


class Both(Algorithm):
    """REINFORCE on tokens and on choices, as far as told."""

    @dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
    class Config:
        model: bool = True
        policy: bool = True

    @property
    def needs(self):
        c = self.config
        trains = frozenset(name for name in ("model", "policy") if getattr(c, name))
        return Needs(old=False, trains=trains, trajectory=c.policy, row_credit=True)

    def advantages(self, rewards, batch):
        return advantage.leave_one_out(rewards.total, batch.group, rewards.included)

    def masks(self, batch, generator, update=0):
        return masking.fully_masked(batch.completion).also_masking(batch.tail)

    def loss(self, new, experience):
        value = torch.zeros((), dtype=torch.float64)
        if self.config.model:
            bound = surrogate.sequence_logp(new, experience)
            value = value - (experience.advantage * bound).sum() / experience.counts.num_tokens
        if self.config.policy:
            value = value - (experience.advantage[:, None] * new.choice_logp).sum() / experience.counts.num_choices
        return Loss(value)


METHODS = {kind.__name__: kind for kind in (LogSumOverDraws, PerDraw, Fresh)}


@pytest.mark.parametrize("name", [*METHODS, "Both"])
def test_they_keep_the_contract(name):
    found = {f.check: f.problem for f in check_plugin("algorithms", f"{__name__}:{name}", {})}
    assert {check: problem for check, problem in found.items() if problem is not None} == {}


def method(name):
    kind = METHODS[name]
    return kind(kind.Config())


def double(family="tiny"):
    denoiser = cases.denoiser(family)
    denoiser.module.double()
    return denoiser


def learner(denoiser, needs, *, kind=TorchLearner, **settings):
    return kind(
        denoiser,
        character_tokenizer("0123456789"),
        LearnerSection(**{"lr": 1e-3, "max_grad_norm": None, "weight_decay": 0.0} | settings),
        needs,
        total_steps=4,
        seed=0,
        dump_folder=Path(tempfile.mkdtemp()),
    )


def one_graph(denoiser, batch, masks):
    """The estimate with everything in a single graph, from whole logits."""
    each = []
    for mask in masks.mask:
        states = denoiser.hidden_states(batch.tokens, mask, batch.valid, batch.block_ids)
        logits = denoiser.unembed(states.flatten(0, 1)).view(*batch.tokens.shape, -1)
        logits = logits.index_fill(-1, torch.tensor([denoiser.mask_id]), float("-inf"))
        each.append(logits.log_softmax(-1).gather(-1, batch.tokens[..., None]).squeeze(-1))
    draws = torch.where(masks.weight != 0, torch.stack(each), 0.0)
    weighted = masks.weight * draws
    return LikelihoodEstimate(token_logp=weighted.sum(0), draw_token_logp=draws)


def detached(estimate):
    return dataclasses.replace(estimate, **{name: value.detach() for name, value in estimate.differentiable.items()})


def flat(tensors):
    return torch.cat([value.flatten() for value in tensors])


def experience_of(batch, scored, weight, drawn, old, reference=None):
    return cases.experience(batch, scored, weight, drawn, old, reference)


@pytest.mark.parametrize("family", ["tiny", "sdar"])
def test_log_probabilities_of_draws_are_those_of_whole_logits_and_only_there_when_needed(family):
    batch = cases.batch(block_causal=family == "sdar")
    masks, denoiser = method("PerDraw").masks(batch, generator_for(0)), double(family)
    want = one_graph(denoiser, batch, masks)
    for budget in BUDGETS:
        one = learner(denoiser, Needs(), tokens_per_microbatch=budget)
        got = one.score(batch, masks, draws=True)
        for name, value in want.differentiable.items():
            torch.testing.assert_close(getattr(got, name), value.detach(), atol=ATOL_F64, rtol=0)
        assert one.score(batch, masks).draw_token_logp is None


@pytest.mark.parametrize("family", ["tiny", "sdar"])
@pytest.mark.parametrize("name", ["LogSumOverDraws", "PerDraw"])
def test_gradient_over_draws_is_that_of_one_graph_whatever_the_micro_batches(name, family):
    algorithm, batch, scored = method(name), cases.batch(block_causal=family == "sdar"), cases.rewards(cases.MIXED)
    masks, weight = algorithm.masks(batch, generator_for(0)), algorithm.advantages(scored, batch)
    denoiser = double(family)
    new = one_graph(denoiser, batch, masks)
    loss = algorithm.loss(new, experience_of(batch, scored, weight, masks, detached(new))).value
    want = flat(torch.autograd.grad(loss, list(denoiser.module.parameters())))
    for budget in BUDGETS:
        denoiser = double(family)
        one = learner(denoiser, algorithm.needs, tokens_per_microbatch=budget)
        metrics = one.update(TrainingBatch(batch, scored, weight, [masks]), algorithm)
        assert metrics["loss"] == pytest.approx(loss.item(), abs=ATOL_F64)
        torch.testing.assert_close(flat(p.grad for p in denoiser.module.parameters()), want, atol=ATOL_F64, rtol=0)


def test_draws_that_the_weighted_sum_leaves_out_are_forwarded_all_the_same():
    """Two draws of opposite advantage cancel in token_logp, and in nothing else."""
    batch, scored = cases.batch(block_causal=False), cases.rewards(cases.MIXED)
    masks = method("PerDraw").masks(batch, generator_for(0))

    class OnlyDraws(PerDraw):
        def loss(self, new, experience):
            return Loss(-(new.draw_token_logp * experience.advantage).sum())

    algorithm = OnlyDraws(OnlyDraws.Config())
    gradients = []
    for budget in BUDGETS:
        one = learner(double(), algorithm.needs, tokens_per_microbatch=budget)
        one.update(TrainingBatch(batch, scored, algorithm.advantages(scored, batch), [masks]), algorithm)
        gradients.append(flat(p.grad for p in one.denoiser.module.parameters()))
    assert float(gradients[0].abs().max()) > 1e-3
    for got in gradients[1:]:
        torch.testing.assert_close(got, gradients[0], atol=ATOL_F64, rtol=0)


@pytest.mark.parametrize("budget", [1 << 14, 60])
def test_fresh_masks_are_scored_before_the_first_update_and_used_by_their_own(budget):
    """Three updates against a loop by hand; the reference is another model, so that the divergence acts."""
    algorithm, batch, scored = method("Fresh"), cases.batch(block_causal=False), cases.rewards(cases.MIXED)
    masks = [algorithm.masks(batch, generator_for(0, "masks", u), u) for u in range(3)]
    weight = algorithm.advantages(scored, batch)
    denoiser = double()
    one = learner(denoiser, algorithm.needs, lr=1e-2, updates_per_step=3, tokens_per_microbatch=budget)
    with torch.no_grad():
        for parameter in denoiser.module.parameters():
            parameter.mul_(1.01)
    hand = copy.deepcopy(denoiser)
    reference = [one.score(batch, drawn, reference=True) for drawn in masks]
    one.update(TrainingBatch(batch, scored, weight, masks, reference), algorithm)

    frozen = double()
    parameters = list(hand.module.parameters())
    adam = torch.optim.AdamW(parameters, 1e-2, one._config.betas, one._config.eps, weight_decay=0.0)
    with torch.no_grad():
        old = [one_graph(hand, batch, drawn) for drawn in masks]
        anchor = [one_graph(frozen, batch, drawn) for drawn in masks]
    for drawn, was, base in zip(masks, old, anchor, strict=True):
        adam.zero_grad()
        algorithm.loss(
            one_graph(hand, batch, drawn), experience_of(batch, scored, weight, drawn, was, base)
        ).value.backward()
        adam.step()
    torch.testing.assert_close(flat(denoiser.module.parameters()), flat(parameters), atol=1e-8, rtol=0)


def test_without_an_old_policy_nothing_is_scored_before_the_updates():
    batch, scored = cases.batch(block_causal=False), cases.rewards(cases.MIXED)
    forwards, digests = {}, {}
    for old in (True, False):
        algorithm = build("algorithms", "wd1", {})
        needs = dataclasses.replace(algorithm.needs, old=old)
        one = learner_for(needs, batch, "tiny", updates_per_step=3)
        masks = [algorithm.masks(batch, generator_for(0, "masks", u), u) for u in range(3)]
        subject = SimpleNamespace(needs=needs, loss=algorithm.loss)
        one.update(TrainingBatch(batch, scored, algorithm.advantages(scored, batch), masks), subject)
        forwards[old], digests[old] = one.ticks, one.version().digest
    assert forwards == {True: 5, False: 3} and digests[True] == digests[False]


def test_as_many_masks_as_updates_or_one():
    algorithm, batch, scored = method("Fresh"), cases.batch(block_causal=False), cases.rewards(cases.MIXED)
    masks = algorithm.masks(batch, generator_for(0))
    one = learner(double(), Needs(), updates_per_step=3)
    with pytest.raises(AssertionError, match="2 entries of masks for 3 updates"):
        one.update(TrainingBatch(batch, scored, torch.ones(6), [masks] * 2), algorithm)


def both(**options):
    return Both(Both.Config(**options))


def gradients_of(algorithm, budget):
    batch, scored = cases.batch(block_causal=False), cases.rewards(cases.MIXED)
    one = learner_for(algorithm.needs, batch, "tiny", tokens_per_microbatch=budget, max_grad_norm=None)
    masks = algorithm.masks(batch, generator_for(0))
    one.update(TrainingBatch(batch, scored, algorithm.advantages(scored, batch), [masks]), algorithm)
    return {name: p.grad for name, p in one.named_weights() if p.grad is not None}


@pytest.mark.parametrize("budget", [1 << 14, 60])
def test_joint_training_has_the_gradients_of_each_alone_in_one_graph(budget):
    model, policy = (gradients_of(both(**{other: False}), 1 << 14) for other in ("policy", "model"))
    alone = model | {f"policy.{name}": value for name, value in policy.items()}
    joint = gradients_of(both(), budget)
    assert joint.keys() == alone.keys() and len(policy) > 5
    for name, value in alone.items():
        torch.testing.assert_close(joint[name], value, atol=1e-6, rtol=1e-4, msg=name)


def test_a_joint_checkpoint_holds_both(tmp_path):
    batch, scored, algorithm = cases.batch(block_causal=False), cases.rewards(cases.MIXED), both()
    masks, ends = algorithm.masks(batch, generator_for(0)), []

    def step(one):
        return one.update(TrainingBatch(batch, scored, algorithm.advantages(scored, batch), [masks]), algorithm)

    whole = learner_for(algorithm.needs, batch, "tiny")
    step(whole)
    whole.save(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"model", "policy", "optimizer.pt"}
    again = learner_for(algorithm.needs, batch, "tiny")
    assert again.version() != whole.version()
    again.load(tmp_path)
    for one in (whole, again):
        ends.append((one.version(), step(one), one.version()))
    assert ends[0] == ends[1]


def train_on_rank(rank, size, names):
    from dllm_rl.learner.deepspeed_learner import DeepSpeedLearner

    out = []
    for name, stage, minibatches in names:
        algorithm, batch, scored = method(name), cases.batch(block_causal=False), cases.rewards(cases.MIXED)
        masks = [algorithm.masks(batch, generator_for(0, "masks", u), u) for u in range(2)]
        masks, weight = masks if algorithm.needs.fresh_masks else masks[:1], algorithm.advantages(scored, batch)
        settings = {"updates_per_step": 2, "tokens_per_microbatch": 60, "minibatches": minibatches}
        if stage is None:
            one = learner(cases.denoiser("tiny"), algorithm.needs, **settings)
            share = TrainingBatch(batch, scored, weight, masks)
        else:
            sharded = {"stage3_param_persistence_threshold": 0} if stage == 3 else {}
            settings |= {"backend": "deepspeed", "zero_stage": stage, "zero_options": sharded}
            one = learner(cases.denoiser("tiny"), algorithm.needs, kind=DeepSpeedLearner, **settings)
            share = deal(TrainingBatch(batch, scored, weight, masks), minibatches, size)[rank]
        for _ in range(3):
            reference = None
            if algorithm.needs.reference:
                reference = [one.score(share.batch, m, reference=True) for m in share.masks]
            one.update(dataclasses.replace(share, reference=reference), algorithm)
        found = weights(one) if stage is not None else dict(one.named_weights())
        out.append({name: torch.as_tensor(value).detach().numpy().copy() for name, value in found.items()})
    return out


def test_two_ranks_equal_one_process():
    chosen = [(name, stage, 1) for name in METHODS for stage in (2, 3)]
    chosen += [("Fresh", stage, 2) for stage in (0, 1, 2, 3)]
    for (name, stage, minibatches), got in zip(chosen, on_ranks(2, train_on_rank, chosen), strict=True):
        (want,) = train_on_rank(0, 1, [(name, None, minibatches)])
        for key, value in want.items():
            assert abs(got[key] - value).max() < 1e-6, f"{name}, stage {stage}, {minibatches} minibatches: {key}"


def test_rows_of_an_estimate_come_apart_and_together():
    batch = cases.batch(block_causal=False)
    masks = method("PerDraw").masks(batch, generator_for(0))
    whole = cases.estimate(batch, masks, Needs(draws=True, trains=frozenset({"model", "policy"})), seed=0)
    first, second = torch.tensor([4, 0]), torch.tensor([1, 2, 3, 5])
    back = LikelihoodEstimate.join([whole.select(first), whole.select(second)])
    back = back.select(torch.cat([first, second]).argsort())
    for field in dataclasses.fields(whole):
        assert torch.equal(getattr(back, field.name), getattr(whole, field.name)), field.name


def test_one_helper_knows_the_three_shapes_of_advantages():
    rows, factor = torch.tensor([2, 0]), torch.tensor([1.0, 2.0, 3.0])
    for value in (torch.rand(3), torch.rand(3, 4), torch.rand(2, 3, 4)):
        axis = 0 if value.dim() < 3 else 1
        assert torch.equal(rows_of(value, rows), value.index_select(axis, rows))
        others = [i for i in range(value.dim()) if i != axis]
        torch.testing.assert_close(advantage.per_row(value), value.sum(others) if others else value)
        scaled = advantage.scaled(value, factor)
        assert scaled.shape == value.shape
        torch.testing.assert_close(advantage.per_row(scaled), advantage.per_row(value) * factor)
    tokens = torch.rand(3, 4)
    assert torch.equal(advantage.scaled(torch.ones(3), tokens), tokens)
    assert torch.equal(advantage.scaled(torch.ones(2, 3, 4), tokens), tokens.expand(2, 3, 4))


def test_plans_do_not_depend_on_what_is_kept():
    """The second phase forwards only what the loss depends on."""
    batch, denoiser = cases.batch(block_causal=False), double()
    masks = method("PerDraw").masks(batch, generator_for(0))
    one = learner(denoiser, Needs(), tokens_per_microbatch=1)
    slope = one.score(batch, masks, draws=True)
    nothing = {name: torch.zeros_like(value) for name, value in slope.differentiable.items()}
    nothing["draw_token_logp"][1, 2] = 1.0
    shares = one._model.shares(batch, masks, dataclasses.replace(slope, **nothing))
    assert len(shares) == 1 < len(likelihood.plan(batch, masks, 1))
