"""A reference that follows the policy: by the equation, at its update, in every learner, and after a resume."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

from dllm_rl.config.cluster import LearnerSection, ReferenceSection
from dllm_rl.config.schema import Config
from dllm_rl.conformance import cases
from dllm_rl.conformance.algorithms import Subject
from dllm_rl.driver.learner_group import deal
from dllm_rl.errors import UserError
from dllm_rl.learner.moving_reference import MovingReference
from dllm_rl.learner.torch_learner import TorchLearner
from dllm_rl.models.lora import add_lora, load_adapter, merged_updates, merged_weights
from dllm_rl.models.tokenizers import character_tokenizer
from dllm_rl.seeding import generator_for
from dllm_rl.train import train
from dllm_rl.types import TrainingBatch
from dllm_rl.workers.learner_worker import LearnerWorker

ATOL_F64 = 1e-12
METHOD = {"beta": 0.3, "fresh_masks": False}
RANK, ALPHA = 2, 8.0


@dataclasses.dataclass(frozen=True)
class Case:
    """A learner of coupled-GRPO whose divergence counts."""

    lora: bool = False
    dtype: torch.dtype = torch.float64
    kind: str = "ema"
    every: int = 1
    updates: int = 1  # passes over a batch
    minibatches: int = 1
    beta: float = 0.3
    stage: int | None = None  # of ZeRO; None = the torch learner
    lr: float = 1e-2

    @property
    def reference(self):
        moves = {"every": self.every, "weight": 0.6} if self.kind == "ema" else {}
        return ReferenceSection(kind=self.kind, **moves)

    @property
    def subject(self):
        return Subject("coupled_grpo", METHOD | {"beta": self.beta})


def made(case: Case, folder: Path, kind: type[TorchLearner] = TorchLearner, **settings):
    denoiser = cases.denoiser("tiny")
    denoiser.module.to(case.dtype)
    if case.lora:
        add_lora(denoiser, rank=RANK, alpha=ALPHA, seed=1)
        denoiser.module.to(case.dtype)
    section = LearnerSection(
        lr=case.lr,
        tokens_per_microbatch=128,
        updates_per_step=case.updates,
        minibatches=case.minibatches,
        reference=case.reference,
        **settings,
    )
    tokenizer, needs = character_tokenizer("0123456789 "), case.subject.algorithm.needs
    return kind(denoiser, tokenizer, section, needs, total_steps=8, seed=0, dump_folder=folder)


def step(learner, case: Case, rank=0, size=1):
    """One step on a rank's rows of the conformance batch; (metrics, likelihoods under the reference)."""
    subject = case.subject
    batch, algorithm = subject.batch(False), subject.algorithm
    masks, advantage = [subject.masks(batch, seed=learner.step)], algorithm.advantages(subject.scored(), batch)
    training = TrainingBatch(batch, subject.scored(), advantage, masks)
    if size > 1:
        training = deal(training, case.minibatches, size)[rank]
    if not algorithm.needs.reference:
        return learner.update(training, algorithm), None
    reference = learner.score(training.batch, training.masks[0], reference=True)
    return learner.update(dataclasses.replace(training, reference=[reference]), algorithm), reference.token_logp


def scores(learner, case: Case, *, reference=True):
    """Likelihoods of fixed draws under the reference, or the policy."""
    batch = case.subject.batch(False)
    return learner.score(batch, case.subject.masks(batch, seed=99), reference=reference).token_logp


def numbers(named):
    return {name: value.detach().double().clone() for name, value in named}


def policy(learner):
    with learner.reading(list(learner.denoiser.module.parameters())):
        return numbers((n, p) for n, p in learner.denoiser.module.named_parameters() if ".reference." not in n)


def reference(learner):
    return numbers(learner._model._reference.module.named_parameters())


def averaged(average, weights, weight=0.6):
    """The equation."""
    return {name: (1 - weight) * value + weight * weights[name] for name, value in average.items()}


def close(got, want):
    assert got.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, atol=ATOL_F64, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


def test_each_move_is_the_average_of_policy_and_reference(tmp_path):
    case = Case()
    learner = made(case, tmp_path)
    want = reference(learner)
    for _ in range(3):
        step(learner, case)
        want = averaged(want, policy(learner))
        close(reference(learner), want)
    assert max((want[name] - value).abs().max() for name, value in policy(learner).items()) > 1e-3


@pytest.mark.parametrize(("every", "moved_at"), [(8, (2, 4)), (4, (1, 2, 3, 4))])
def test_it_counts_updates_of_passes_and_minibatches_rather_than_steps(tmp_path, every, moved_at):
    case = Case(every=every, updates=2, minibatches=2)  # 4 updates per step
    learner = made(case, tmp_path)
    want = reference(learner)
    for number in range(1, 5):
        step(learner, case)
        if number in moved_at:
            want = averaged(want, policy(learner))
        close(reference(learner), want)


def test_a_skipped_step_has_no_update(tmp_path):
    case = Case(every=2)
    learner = made(case, tmp_path)
    start = reference(learner)
    step(learner, case)
    learner.skip()
    close(reference(learner), start)
    step(learner, case)
    close(reference(learner), averaged(start, policy(learner)))


def test_a_move_counts_from_the_next_batch_on(tmp_path):
    """Two updates per step, a move after each: the first step has the bits of a frozen reference's, later ones not."""
    moving, frozen = (Case(kind=kind, updates=2) for kind in ("ema", "frozen"))
    one, other = made(moving, tmp_path), made(frozen, tmp_path)
    first, same = step(one, moving), step(other, frozen)
    assert first[0] == same[0] and torch.equal(first[1], same[1])
    assert all(torch.equal(a, b) for a, b in zip(policy(one).values(), policy(other).values(), strict=True))
    (then, _), (still, _) = step(one, moving), step(other, frozen)
    assert abs(then["loss"] - still["loss"]) > 1e-4


def whole(parameters, *, writing=False):
    """Nothing is sharded here."""
    return contextlib.nullcontext()


def low(value, policy_value, *, weight=0.6, moves=1, size=1 << 16):
    own, followed = (nn.Parameter(torch.full((size,), x, dtype=torch.bfloat16)) for x in (value, policy_value))
    section = ReferenceSection(kind="ema", every=1, weight=weight)
    one = MovingReference([([own.requires_grad_(False)], [followed])], section, seed=3)
    for _ in range(moves):
        one.updated(whole)
    return own.detach().double()


def test_in_bfloat16_averages_are_right_on_the_mean_and_equal_weights_stay():
    value, following = 0.02001953125, 0.0201416015625  # neighbours: rounding to the nearest copies the second
    assert torch.nextafter(torch.tensor(value).bfloat16(), torch.tensor(1.0).bfloat16()).item() == following
    for weight, moves in ((0.6, 1), (0.4, 1), (0.05, 10)):
        want = following + (value - following) * (1 - weight) ** moves
        found = low(value, following, weight=weight, moves=moves)
        deviation = found.std() / len(found) ** 0.5
        assert abs(found.mean() - want) < 4 * deviation, f"weight {weight}: {found.mean()}, expected {want}"
    assert torch.equal(low(value, value, moves=20), torch.full((1 << 16,), value, dtype=torch.float64))
    assert torch.equal(low(value, following), low(value, following)), "the same draws every time"


def updates_of(learner, adapter):
    """Dense B A of every adapted layer, in float64."""
    layers = (m for m in learner.denoiser.module.modules() if hasattr(m, "lora_A"))
    return [
        layer.lora_B[adapter].weight.detach().double() @ layer.lora_A[adapter].weight.detach().double()
        for layer in layers
    ]


def nearest(product):
    """The best product of the rank, by a singular value decomposition of the whole layer."""
    left, scale, right = torch.linalg.svd(product, full_matrices=False)
    return left[:, :RANK] * scale[:RANK] @ right[:RANK]


def test_with_lora_the_reference_starts_as_the_base_and_becomes_the_nearest_average(tmp_path):
    case = Case(lora=True)
    learner, base = made(case, tmp_path), made(Case(), tmp_path)
    assert torch.equal(scores(learner, case), scores(base, Case(), reference=False))
    want = [torch.zeros_like(product) for product in updates_of(learner, "reference")]
    for number in range(4):
        step(learner, case)
        exact = [0.4 * a + 0.6 * b for a, b in zip(want, updates_of(learner, "default"), strict=True)]
        want = [nearest(product) for product in exact]
        got = updates_of(learner, "reference")
        for ours, theirs, whole in zip(got, want, exact, strict=True):
            torch.testing.assert_close(ours, theirs, atol=ATOL_F64, rtol=0)
            if number == 0:  # one adapter and nothing: of its rank
                torch.testing.assert_close(ours, whole, atol=ATOL_F64, rtol=0)
    assert torch.cat([x.flatten() for x in want]).norm() > 0.1


def test_with_lora_the_reference_is_the_base_and_the_second_adapter(tmp_path):
    case = Case(lora=True)
    learner = made(case, tmp_path)
    step(learner, case)
    plain = made(Case(), tmp_path)
    weights = dict(plain.denoiser.module.named_parameters())
    names = [name for name, _, _ in merged_updates(learner.denoiser)]
    with torch.no_grad():
        for name, product in zip(names, updates_of(learner, "reference"), strict=True):
            weights[name].add_(ALPHA / RANK * product)
    torch.testing.assert_close(scores(learner, case), scores(plain, Case(), reference=False), atol=ATOL_F64, rtol=0)
    step(learner, case)  # and the first adapter is the one that is trained again


def test_a_layer_smaller_than_its_rank():
    own, followed = ([nn.Parameter(torch.zeros(4, 3)), nn.Parameter(torch.zeros(5, 4))] for _ in range(2))
    for place, parameter in enumerate(followed):
        nn.init.normal_(parameter, generator=generator_for(place))
    pair = ([p.requires_grad_(False) for p in own], followed)
    section = ReferenceSection(kind="ema", every=1, weight=0.25)
    MovingReference([pair], section, seed=0).updated(whole)
    (a, b), (policy_a, policy_b) = pair
    torch.testing.assert_close(b @ a, 0.25 * policy_b @ policy_a)


def test_the_second_adapter_is_not_trained_sent_or_saved(tmp_path):
    case = Case(lora=True, dtype=torch.float32)
    learner, frozen = made(case, tmp_path), made(Case(lora=True, dtype=torch.float32, kind="frozen"), tmp_path)
    names = [name for name, _ in frozen.named_weights()]
    for _ in range(2):  # scoring turns adapters on and off
        trains = [name for name, p in learner.denoiser.module.named_parameters() if p.requires_grad]
        assert [name for name, _ in learner.named_weights()] == trains == names
        step(learner, case)
    for merged in (False, True):
        sent, usual = (LearnerWorker(one, _Rank(), one.denoiser, merged=merged) for one in (learner, frozen))
        assert sent.tensor_specs() == usual.tensor_specs()
    assert {n for n, _ in merged_weights(learner.denoiser)} == {n for n, _ in merged_weights(frozen.denoiser)}
    learner.save(tmp_path / "moving")
    frozen.save(tmp_path / "frozen")
    files = [
        {str(p.relative_to(tmp_path / kind)) for p in (tmp_path / kind).rglob("*")} for kind in ("moving", "frozen")
    ]
    assert files[0] - files[1] == {"reference.pt"} and not files[1] - files[0]
    keys = []
    for kind in ("moving", "frozen"):
        with safe_open(tmp_path / kind / "model" / "adapter_model.safetensors", "pt") as file:
            keys.append(set(file.keys()))
    assert keys[0] == keys[1]
    plain = cases.denoiser("tiny")
    assert load_adapter(plain, tmp_path / "moving" / "model") == len(keys[0]) // 2


@dataclasses.dataclass(frozen=True)
class _Rank:
    rank: int = 0
    host: str = ""


def equal(one, other, case):
    assert torch.equal(scores(one, case), scores(other, case)), "the reference"
    assert all(torch.equal(a, b) for a, b in zip(policy(one).values(), policy(other).values(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lora", [False, True])
def test_a_resumed_run_has_the_same_bits(tmp_path, lora, dtype):
    case = Case(lora=lora, dtype=dtype, every=3, updates=2)  # moves at updates 3 and 6, saved at 4
    whole, resumed = made(case, tmp_path), made(case, tmp_path)
    for number in range(4):
        step(whole, case)
        if number == 1:
            whole.save(tmp_path / "saved")
    assert not torch.equal(scores(resumed, case), scores(whole, case))
    resumed.load(tmp_path / "saved")
    for _ in range(2):
        step(resumed, case)
    equal(whole, resumed, case)


def test_a_run_that_was_frozen_moves_on_from_the_start(tmp_path):
    before, after = Case(kind="frozen"), Case(every=2)
    first, then = made(before, tmp_path), made(after, tmp_path)
    start = reference(then)
    step(first, before)
    first.save(tmp_path / "saved")
    then.load(tmp_path / "saved")
    step(then, after)
    close(reference(then), start)
    step(then, after)
    close(reference(then), averaged(start, policy(then)))


def test_a_reference_that_has_moved_is_not_taken_back_unseen(tmp_path):
    case = Case()
    learner = made(case, tmp_path)
    step(learner, case)
    learner.save(tmp_path / "saved")
    with pytest.raises(UserError, match=r"holds a reference that has moved.*set kind: ema \(with every"):
        made(Case(kind="frozen"), tmp_path).load(tmp_path / "saved")
    unread = made(Case(kind="frozen", beta=0.0), tmp_path)  # needs none any more
    unread.load(tmp_path / "saved")
    still = Case(every=1_000_000)
    kept = made(still, tmp_path)
    kept.load(tmp_path / "saved")
    step(kept, still)
    close(reference(kept), reference(learner))


@pytest.mark.parametrize("lora", [None, {"rank": 2}])
def test_a_run_that_is_stopped_goes_on_with_the_same_bits(tmp_path, lora):
    """Through the driver, with an engine that decodes with the learner's network, adapters and all."""
    tiny = {"hidden_size": 32, "num_layers": 1, "num_heads": 4, "max_length": 40}
    config = Config.model_validate(
        {
            "run": {"name": "run", "steps": 4, "output": str(tmp_path), "threads": 1},
            "model": {"family": "tiny", "init": tiny, "lora": lora},
            "data": {"task": {"name": "sudoku4", "train_puzzles": 8, "test_puzzles": 4}, "prompts_per_step": 2},
            "sampling": {"max_new_tokens": 16, "tokens_per_step": 4},
            "algorithm": {"name": "coupled_grpo", "beta": 0.3},
            "learner": {"lr": 1e-2, "updates_per_step": 2, "reference": {"kind": "ema", "every": 3}},
            "rewards": [{"name": "sudoku"}, {"name": "format", "pattern": "[12]"}],
            "reward_pool": {"workers": 1},
            "evaluate": {"at_start": False, "at_end": False},
            "checkpoint": {"every_steps": 2},
        }
    )

    def saved(last):
        folder = tmp_path / f"run/checkpoints/step-{last:06d}"
        weights = next((folder / "model").glob("*model*.safetensors")).read_bytes()
        return weights, torch.load(folder / "reference.pt", weights_only=True)

    train(config)
    weights, kept = saved(4)
    assert kept["updates"] == 8 and saved(2)[1]["updates"] == 4
    assert any(bool((a != b).any()) for a, b in zip(kept["weights"], saved(2)[1]["weights"], strict=True))
    train(config, from_checkpoint="step-000002")
    again, resumed = saved(4)
    assert again == weights and all(
        torch.equal(*pair) for pair in zip(resumed["weights"], kept["weights"], strict=True)
    )
