"""DeepSpeed at every ZeRO stage, one rank and two, against the torch learner: same weights, same metrics."""

from __future__ import annotations

import dataclasses
import socket
import tempfile
import traceback
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as multiprocessing

from dllm_rl.config.cluster import LearnerSection
from dllm_rl.conformance import cases
from dllm_rl.conformance.algorithms import Subject
from dllm_rl.learner.torch_learner import NonFiniteError, TorchLearner
from dllm_rl.models.lora import add_lora
from dllm_rl.models.tokenizers import character_tokenizer
from dllm_rl.types import GlobalCounts, Minibatch, TrainingBatch

STEPS = 5
ALL_STAGES = (0, 1, 2, 3)


@dataclasses.dataclass(frozen=True)
class Case:
    """A method on its conformance batch; a budget of 128 tokens makes several micro-batches, 1 << 14 makes one."""

    name: str = "coupled_grpo"
    lora: bool = False
    budget: int = 128
    stage: int = 2
    idle: bool = False  # rank 1 has no rows

    def options(self) -> dict:
        return {"lr": 1e-3, "tokens_per_microbatch": self.budget, "updates_per_step": 2}

    def zero(self) -> dict:
        """ZeRO 3 does not take small parameters apart unless it is told to, and all of ours are small."""
        sharded = {"stage3_param_persistence_threshold": 0} if self.stage == 3 else {}
        return {"backend": "deepspeed", "zero_stage": self.stage, "zero_options": sharded}


def parts(case: Case):
    subject, denoiser = Subject(case.name, {}), cases.denoiser("tiny")
    if case.lora:
        add_lora(denoiser, rank=4, alpha=8.0, seed=1)
    batch, rewards = subject.batch(False), subject.scored()
    return subject.algorithm, denoiser, batch, rewards, subject.masks(batch)


def learner(kind, case: Case, algorithm, denoiser, **more):
    return kind(
        denoiser,
        character_tokenizer("0123456789 "),
        LearnerSection(**case.options(), **more),
        algorithm.needs,
        total_steps=STEPS,
        seed=0,
        dump_folder=Path(tempfile.mkdtemp()),
    )


def train(made, algorithm, batch, rewards, advantage, masks, counts=None, steps=STEPS):
    out = []
    for _ in range(steps):
        reference = [made.score(batch, masks, reference=True)] if algorithm.needs.reference else None
        whole = None if counts is None else [Minibatch(torch.arange(len(batch)), counts)]
        out.append(made.update(TrainingBatch(batch, rewards, advantage, [masks], reference, whole), algorithm))
    return out


def by_torch(case: Case):
    algorithm, denoiser, batch, rewards, masks = parts(case)
    made = learner(TorchLearner, case, algorithm, denoiser)
    metrics = train(made, algorithm, batch, rewards, algorithm.advantages(rewards, batch), masks)
    return {name: value.detach() for name, value in denoiser.module.named_parameters()}, metrics


def own_rows(case: Case, rank: int, size: int):
    algorithm, denoiser, batch, rewards, masks = parts(case)
    counts = dataclasses.replace(GlobalCounts.of(batch), idle=case.idle and rank == 1)
    rows = torch.arange(rank * len(batch) // size, (rank + 1) * len(batch) // size)
    if case.idle:
        rows = torch.tensor([0]) if counts.idle else torch.arange(len(batch))
    advantage = algorithm.advantages(rewards, batch)[rows]
    masks = masks.select(rows)
    if counts.idle:
        masks = dataclasses.replace(masks, weight=torch.zeros_like(masks.weight))
    return algorithm, denoiser, batch.select(rows), rewards.select(rows), advantage, masks, counts


def weights(made):
    with made.reading(list(made.denoiser.module.parameters())):
        return {name: value.detach().numpy().copy() for name, value in made.denoiser.module.named_parameters()}


def in_a_rank(rank, size, port, work, arguments, answers):
    from dllm_rl.learner.zero import join_ranks
    from dllm_rl.weight_transfer.keyed_store import keyed_store

    torch.set_num_threads(1)
    try:
        store, _ = keyed_store("127.0.0.1", port, "ranks", leads=rank == 0, timeout_s=60.0)
        join_ranks(rank, size, store)
        answers.put((rank, None, work(rank, size, *arguments)))
    except BaseException:
        answers.put((rank, traceback.format_exc(), None))
        raise
    finally:
        torch.distributed.destroy_process_group()


def on_ranks(size, work, *arguments):
    """What rank 0 returns."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    ranks = [context.Process(target=in_a_rank, args=(r, size, port, work, arguments, answers)) for r in range(size)]
    for process in ranks:
        process.start()
    try:
        found = {}
        for _ in ranks:
            rank, problem, answer = answers.get(timeout=180)
            assert problem is None, problem
            found[rank] = answer
        return found[0]
    finally:
        for process in ranks:
            process.join(10)
            process.kill()


def train_all(rank, size, chosen):
    from dllm_rl.learner.deepspeed_learner import DeepSpeedLearner

    out = []
    for case in chosen:
        algorithm, denoiser, *rest = own_rows(case, rank, size)
        made = learner(DeepSpeedLearner, case, algorithm, denoiser, **case.zero())
        metrics = train(made, algorithm, *rest)
        out.append((weights(made), metrics))
    return out


@pytest.mark.parametrize("size", [1, 2])
def test_every_stage_equals_the_torch_learner(size):
    chosen = [Case(lora=lora, stage=stage) for lora in (False, True) for stage in ALL_STAGES]
    chosen += [Case("gdpo", budget=1 << 14, stage=stage) for stage in (2, 3)]
    if size == 2:
        chosen += [Case("igpo", budget=64, stage=stage, idle=True) for stage in (2, 3)]
    known = {}
    for case, (got, metrics) in zip(chosen, on_ranks(size, train_all, chosen), strict=True):
        same = dataclasses.replace(case, stage=0)
        want, expected = known.setdefault(same, by_torch(same))
        for name, value in want.items():
            torch.testing.assert_close(torch.from_numpy(got[name]), value, rtol=0, atol=1e-6, msg=f"{case}: {name}")
        for step, (ours, theirs) in enumerate(zip(metrics, expected, strict=True)):
            assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5), f"{case}, step {step}"


def save_and_resume(rank, size, case, folder, start, stop):
    from dllm_rl.learner.deepspeed_learner import DeepSpeedLearner

    algorithm, denoiser, *rest = own_rows(case, rank, size)
    made = learner(DeepSpeedLearner, case, algorithm, denoiser, **case.zero())
    if start:
        made.load(folder)
        assert made.step == start
    train(made, algorithm, *rest, steps=3 - start)
    if not start:
        made.save(folder)
    train(made, algorithm, *rest, steps=stop - 3)
    return weights(made)


@pytest.mark.parametrize(
    ("stage", "lora"),
    [pytest.param(2, False, marks=pytest.mark.slow), pytest.param(3, True, marks=pytest.mark.slow), (3, False)],
)
def test_resume_is_exact_at_the_same_size_and_close_at_another(tmp_path, stage, lora):
    case = Case(stage=stage, lora=lora)
    whole = on_ranks(2, save_and_resume, case, tmp_path, 0, STEPS)
    same = on_ranks(2, save_and_resume, case, tmp_path, 3, STEPS)
    fewer = on_ranks(1, save_and_resume, case, tmp_path, 3, STEPS)
    for name, value in whole.items():
        assert (same[name] == value).all(), name
        assert abs(fewer[name] - value).max() < 1e-6, name


def stop_before_damage(rank, size, stages):
    from dllm_rl.learner.deepspeed_learner import DeepSpeedLearner

    out = []
    for stage in stages:
        case = Case(stage=stage)
        algorithm, denoiser, batch, rewards, advantage, masks, counts = own_rows(case, rank, size)
        made = learner(DeepSpeedLearner, case, algorithm, denoiser, **case.zero())
        before = weights(made)
        with pytest.raises(NonFiniteError, match="is nan"):
            train(made, algorithm, batch, rewards, advantage * float("nan"), masks, counts)
        after = weights(made)
        out.append(all((before[name] == after[name]).all() for name in before))
    return out


def test_a_bad_loss_stops_every_rank_before_the_weights_change():
    assert on_ranks(2, stop_before_damage, (0, 3)) == [True, True]


def without_signal(rank, size, stages):
    from dllm_rl.learner.deepspeed_learner import DeepSpeedLearner

    out = []
    for stage in stages:
        case = Case("trace_rl", budget=64, stage=stage)
        algorithm, denoiser, batch, rewards, advantage, masks, counts = own_rows(case, rank, size)
        made = learner(DeepSpeedLearner, case, algorithm, denoiser, **case.zero())
        before = weights(made)
        flat = train(made, algorithm, batch, rewards, 0 * advantage, masks, counts, steps=1)[0]
        still = all((before[name] == value).all() for name, value in weights(made).items())
        signal = train(made, algorithm, batch, rewards, advantage, masks, counts, steps=1)[0]
        out.append((flat["grad_norm"], still, signal["grad_norm"]))
    return out


def test_a_batch_without_signal_is_a_step_like_any_other():
    """Every group is flat: all coefficients are zero, and no micro-batch would be forwarded."""
    for flat, still, signal in on_ranks(2, without_signal, ALL_STAGES):
        assert flat == 0.0 and still and signal > 0


def train_low(rank, size, cases_of_stages):
    from dllm_rl.learner.deepspeed_learner import DeepSpeedLearner

    out = []
    for case in cases_of_stages:
        algorithm, denoiser, *rest = own_rows(case, rank, size)
        denoiser.module.bfloat16()
        made = learner(DeepSpeedLearner, case, algorithm, denoiser, **case.zero())
        before = weights_float(made)
        train(made, algorithm, *rest)
        after = weights_float(made)
        out.append({name: after[name] - before[name] for name in after})
    return out


def weights_float(made):
    with made.reading(list(made.denoiser.module.parameters())):
        named = made.denoiser.module.named_parameters()
        return {name: value.detach().float().numpy().copy() for name, value in named}


def test_bfloat16_has_master_weights_at_every_stage():
    """Against the torch learner's masters: the parameters are the same bfloat16 numbers but for a rounding."""
    chosen = [Case("masked_sft", stage=stage) for stage in ALL_STAGES]
    algorithm, denoiser, batch, rewards, masks = parts(chosen[0])
    denoiser.module.bfloat16()
    made = learner(TorchLearner, chosen[0], algorithm, denoiser)
    before = {name: value.detach().float().clone() for name, value in denoiser.module.named_parameters()}
    train(made, algorithm, batch, rewards, algorithm.advantages(rewards, batch), masks)
    for case, got in zip(chosen, on_ranks(2, train_low, chosen), strict=True):
        for name, value in denoiser.module.named_parameters():
            want = value.detach().float() - before[name]
            found = torch.from_numpy(got[name])
            assert torch.cosine_similarity(found.flatten(), want.flatten(), dim=0) > 0.99, f"{case}: {name}"
            assert (found.norm() / want.norm()).item() == pytest.approx(1, abs=0.02), f"{case}: {name}"
