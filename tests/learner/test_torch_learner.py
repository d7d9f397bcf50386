"""The learner: exact gradients whatever the micro-batch, schedules, clipping, non-finite stops."""

from __future__ import annotations

import math

import pytest
import torch

from dllm_rl import registry, seeding
from dllm_rl.config.cluster import LearnerSection
from dllm_rl.diffusion.layout import block_index
from dllm_rl.learner.schedule import learning_rate
from dllm_rl.learner.torch_learner import NonFiniteError, TorchLearner
from dllm_rl.models.tokenizers import character_tokenizer
from dllm_rl.protocols.algorithm import Needs
from dllm_rl.types import LikelihoodEstimate, MaskSample, Rewards, RolloutBatch, TrainingBatch

ATOL_F64 = 1e-10
ALGORITHMS = {
    "masked_sft": {},
    "diffu_grpo": {"beta": 0.1, "reduction": "sequence_mean"},
    "coupled_grpo": {"beta": 0.1},
    "trace_rl": {"beta": 0.1, "reduction": "sequence_sum"},
}


def make_batch(denoiser, *, extra=0, order=None) -> RolloutBatch:
    generator = seeding.generator_for(7)
    n, prompt, length = 6, 3, 9
    width = length + extra
    valid = torch.arange(width).expand(n, width) < torch.tensor([9, 8, 9, 7, 6, 9])[:, None]
    completion = valid & (torch.arange(width) >= prompt)
    tail = torch.zeros_like(valid)
    tail[0, 8], completion[0, 8] = True, False
    tokens = torch.randint(3, denoiser.vocab_size, (n, length), generator=generator)
    tokens = torch.nn.functional.pad(tokens, (0, extra), value=denoiser.pad_id)
    step = torch.nn.functional.pad(torch.randint(0, 4, (n, length), generator=generator), (0, extra), value=-1)
    prompt_length = torch.full((n,), prompt)
    blocks = None
    if denoiser.block_size is not None:
        blocks = block_index(prompt_length, width, denoiser.block_size, denoiser.block_origin)
    batch = RolloutBatch(
        tokens=tokens,
        valid=valid,
        completion=completion,
        hint=torch.zeros_like(tail),
        tail=tail,
        unmask_step=torch.where(completion | tail, step, -1),
        behaviour_logp=torch.zeros(n, width),
        prompt_length=prompt_length,
        group=torch.tensor([0, 0, 0, 1, 1, 1]),
        num_forwards=torch.full((n,), 4),
        weights_step=torch.zeros_like(tokens),
        block_ids=blocks,
        exact=True,
    ).check()
    return batch if order is None else batch.select(order)


def make_rewards(order=None) -> Rewards:
    total = torch.tensor([1.0, 0.0, 0.5, 0.0, 0.0, 1.0])
    rewards = Rewards(
        components={"r": total},
        total=total,
        included=torch.ones(6, dtype=torch.bool),
        solved=total >= 1,
        status=("ok",) * 6,
    )
    return rewards if order is None else rewards.select(order)


def one_update(
    tiny_denoiser, tmp_path, name, family="tiny", *, budget=1 << 14, extra=0, order=None, updates=2, **learner
):
    """Weights after one batch, two updates: the second has a ratio that is not one."""
    denoiser = tiny_denoiser(family, dtype=torch.float64)
    algorithm_class = registry.load("algorithms", name)
    algorithm = algorithm_class(algorithm_class.Config(**ALGORITHMS[name]))
    settings = {"lr": 1e-3, "updates_per_step": updates, "tokens_per_microbatch": budget} | learner
    torch_learner = TorchLearner(
        denoiser,
        character_tokenizer("0123456789 "),
        LearnerSection(**settings),
        algorithm.needs,
        total_steps=10,
        seed=0,
        dump_folder=tmp_path,
    )
    whole = make_batch(denoiser, extra=extra)
    masks = algorithm.masks(make_batch(denoiser), seeding.generator_for(0, "masks"))
    pad = torch.nn.functional.pad
    masks = MaskSample(mask=pad(masks.mask, (0, extra)), weight=pad(masks.weight, (0, extra)))
    if order is not None:
        whole, masks = whole.select(order), masks.select(order)
    rewards = make_rewards(order)
    advantage = algorithm.advantages(rewards, whole)
    with torch.no_grad():  # move off the reference, so that a KL term acts
        for parameter in denoiser.module.parameters():
            parameter.mul_(1.01)
    reference = [torch_learner.score(whole, masks, reference=True)] if algorithm.needs.reference else None
    metrics = torch_learner.update(TrainingBatch(whole, rewards, advantage, [masks], reference), algorithm)
    return torch.cat([p.detach().flatten() for p in denoiser.module.parameters()]), metrics, torch_learner


@pytest.mark.parametrize("family", ["tiny", "dream", "sdar"])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_update_does_not_depend_on_microbatch_padding_or_row_order(tiny_denoiser, tmp_path, name, family):
    want, metrics, _ = one_update(tiny_denoiser, tmp_path, name, family)
    variants = [{"budget": 1}, {"budget": 30}, {"extra": 4}, {"order": torch.tensor([3, 0, 5, 1, 4, 2])}]
    for variant in variants:
        got, other, _ = one_update(tiny_denoiser, tmp_path, name, family, **variant)
        torch.testing.assert_close(got, want, atol=ATOL_F64, rtol=0, msg=lambda m, v=variant: f"{v}: {m}")
        assert other == pytest.approx(metrics, abs=1e-9), variant


def test_two_phase_gradient_is_the_gradient_of_the_loss(tiny_denoiser, tmp_path):
    """Against autograd through everything at once, for a loss that is not linear in the likelihoods."""
    batch = make_batch(tiny_denoiser(dtype=torch.float64))
    denoiser = tiny_denoiser(dtype=torch.float64)
    algorithm_class = registry.load("algorithms", "coupled_grpo")
    algorithm = algorithm_class(algorithm_class.Config(beta=0.0, epsilon=0.2))
    masks = algorithm.masks(batch, seeding.generator_for(0))
    gradients = []
    for budget in (1 << 14, 7):
        module = tiny_denoiser(dtype=torch.float64)
        learner = TorchLearner(
            module,
            character_tokenizer("0123456789 "),
            LearnerSection(lr=1e-12, max_grad_norm=None, tokens_per_microbatch=budget),
            Needs(),
            total_steps=1,
            seed=0,
            dump_folder=tmp_path,
        )
        rewards = make_rewards()
        learner.update(TrainingBatch(batch, rewards, algorithm.advantages(rewards, batch), [masks]), algorithm)
        gradients.append(torch.cat([p.grad.flatten() for p in module.module.parameters()]))
    advantage = algorithm.advantages(make_rewards(), batch)
    total = torch.zeros((), dtype=torch.float64)
    for mask, weight in zip(masks.mask, masks.weight, strict=True):
        hidden = denoiser.hidden_states(batch.tokens, mask, batch.valid, None)
        logits = denoiser.unembed(hidden.flatten(0, 1)).view(*batch.tokens.shape, -1)
        logits = logits.index_fill(-1, torch.tensor([denoiser.mask_id]), float("-inf"))
        logp = logits.log_softmax(-1).gather(-1, batch.tokens[..., None]).squeeze(-1)
        total = total - (advantage[:, None] * torch.where(weight != 0, weight * logp, 0.0)).sum()
    total = total / batch.completion.sum()  # REINFORCE: at old = new the ratio is one
    want = torch.cat([g.flatten() for g in torch.autograd.grad(total, list(denoiser.module.parameters()))])
    for got in gradients:
        torch.testing.assert_close(got, want, atol=ATOL_F64, rtol=0)


def test_old_policy_is_fixed_over_the_updates_of_a_step(tiny_denoiser, tmp_path):
    _, first, _ = one_update(tiny_denoiser, tmp_path, "coupled_grpo", updates=1)
    _, third, _ = one_update(tiny_denoiser, tmp_path, "coupled_grpo", updates=3, lr=1e-2)
    assert first["log_ratio_deviation"] == 0.0 and first["effective_samples"] == 1.0
    assert third["log_ratio_deviation"] > 1e-2 and third["effective_samples"] < 1.0


def test_gradient_norm_is_clipped(tiny_denoiser, tmp_path):
    _, metrics, learner = one_update(tiny_denoiser, tmp_path, "masked_sft", updates=1, max_grad_norm=1e-3)
    norm = math.sqrt(sum(p.grad.square().sum().item() for p in learner.denoiser.module.parameters()))
    assert metrics["grad_norm"] > 1e-3  # reported before clipping
    assert norm == pytest.approx(1e-3, rel=1e-3)


def test_zero_advantage_leaves_the_weights_alone(tiny_denoiser, tmp_path):
    denoiser = tiny_denoiser(dtype=torch.float64)
    before = [p.detach().clone() for p in denoiser.module.parameters()]
    algorithm_class = registry.load("algorithms", "trace_rl")
    algorithm = algorithm_class(algorithm_class.Config())
    learner = TorchLearner(
        denoiser,
        None,
        LearnerSection(lr=1e-2, tokens_per_microbatch=30),
        Needs(),
        total_steps=1,
        seed=0,
        dump_folder=tmp_path,
    )
    batch = make_batch(denoiser)
    masks = algorithm.masks(batch, seeding.generator_for(0))
    metrics = learner.update(TrainingBatch(batch, make_rewards(), torch.zeros(6), [masks]), algorithm)
    assert metrics["grad_norm"] == 0.0
    assert all(torch.equal(a, b) for a, b in zip(before, denoiser.module.parameters(), strict=True))


@pytest.mark.parametrize("budget", [1 << 14, 30])
def test_a_non_finite_loss_stops_before_the_update_and_dumps_the_batch(tiny_denoiser, tmp_path, budget):
    denoiser = tiny_denoiser()
    before = [p.detach().clone() for p in denoiser.module.parameters()]
    algorithm_class = registry.load("algorithms", "trace_rl")
    algorithm = algorithm_class(algorithm_class.Config())
    learner = TorchLearner(
        denoiser,
        None,
        LearnerSection(lr=1e-2, tokens_per_microbatch=budget),
        Needs(),
        total_steps=1,
        seed=0,
        dump_folder=tmp_path,
    )
    batch = make_batch(denoiser)
    masks = algorithm.masks(batch, seeding.generator_for(0))
    advantage = torch.tensor([1.0, float("nan"), 0, 0, 0, 0])
    with pytest.raises(NonFiniteError, match="loss is nan at step 0"):
        learner.update(TrainingBatch(batch, make_rewards(), advantage, [masks]), algorithm)
    assert learner.step == 0
    assert all(torch.equal(a, b) for a, b in zip(before, denoiser.module.parameters(), strict=True))
    dump = torch.load(next(tmp_path.glob("non-finite-*.pt")), weights_only=True)
    assert torch.equal(dump["batch"]["tokens"], batch.tokens) and torch.equal(dump["masks"]["mask"], masks.mask)


def test_saved_state_loads_to_the_same_bits_and_the_same_next_update(tiny_denoiser, tmp_path):
    _, _, learner = one_update(tiny_denoiser, tmp_path, "masked_sft")
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    learner.save(folder)
    _, _, other = one_update(tiny_denoiser, tmp_path, "masked_sft", lr=0.05)
    assert other.version() != learner.version()
    other._config = other._optimizer._config = learner._config
    other.load(folder)
    assert other.version() == learner.version() and other.step == 1
    algorithm_class = registry.load("algorithms", "masked_sft")
    algorithm = algorithm_class(algorithm_class.Config())
    batch = make_batch(learner.denoiser)
    masks = algorithm.masks(batch, seeding.generator_for(1))
    for one in (learner, other):
        one.update(TrainingBatch(batch, make_rewards(), torch.ones(6), [masks]), algorithm)
    assert other.version() == learner.version()


def test_loading_another_models_checkpoint_is_refused(tiny_denoiser, tmp_path):
    _, _, learner = one_update(tiny_denoiser, tmp_path, "masked_sft")
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    learner.save(folder)
    small = tiny_denoiser(characters="0123")
    other = TorchLearner(small, None, LearnerSection(), Needs(), total_steps=1, seed=0, dump_folder=tmp_path)
    with pytest.raises(ValueError, match=r"is of another model: lm_head\.weight"):
        other.load(folder)


def test_schedules_by_hand():
    config = LearnerSection(lr=1.0, schedule="cosine", warmup_steps=2, min_lr_ratio=0.1)
    rates = [learning_rate(step, 7, config) for step in range(7)]
    cosine = [0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * k / 5)) for k in range(5)]
    assert rates == pytest.approx([0.5, 1.0, *cosine])
    constant = LearnerSection(lr=1.0, schedule="constant")
    assert [learning_rate(step, 3, constant) for step in range(3)] == [1.0, 1.0, 1.0]


def test_reference_is_the_initial_policy(tiny_denoiser, tmp_path):
    _, _, learner = one_update(tiny_denoiser, tmp_path, "coupled_grpo", lr=1e-2)
    fresh = TorchLearner(
        tiny_denoiser(dtype=torch.float64),
        None,
        LearnerSection(),
        Needs(),
        total_steps=1,
        seed=0,
        dump_folder=tmp_path,
    )
    batch = make_batch(learner.denoiser)
    algorithm_class = registry.load("algorithms", "trace_rl")
    masks = algorithm_class(algorithm_class.Config()).masks(batch, seeding.generator_for(0))
    reference: LikelihoodEstimate = learner.score(batch, masks, reference=True)
    torch.testing.assert_close(reference.token_logp, fresh.score(batch, masks).token_logp, atol=1e-12, rtol=0)
    assert (reference.token_logp - learner.score(batch, masks).token_logp).abs().max() > 1e-3


def test_a_line_and_a_warm_up_by_ratio():
    linear = LearnerSection(lr=1.0, schedule="linear", warmup_ratio=0.2, min_lr_ratio=0.1)
    rates = [learning_rate(step, 10, linear) for step in range(10)]
    assert rates == pytest.approx([0.5, 1.0, *(0.1 + 0.9 * (1 - step / 8) for step in range(8))])
    assert learning_rate(0, 1000, LearnerSection(lr=1.0, warmup_ratio=1e-4)) == 1.0, "a step at least, as elsewhere"
    steps = LearnerSection(lr=1.0, schedule="cosine", warmup_steps=2)
    ratio = LearnerSection(lr=1.0, schedule="cosine", warmup_ratio=0.2)
    assert [learning_rate(s, 10, steps) for s in range(10)] == [learning_rate(s, 10, ratio) for s in range(10)]
