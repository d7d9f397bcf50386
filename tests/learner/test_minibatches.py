"""Several optimiser updates on one batch: how it is split, and what is old in them."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path

import pytest
import torch

from algorithms.trace_rl import TraceRL
from dllm_rl.conformance import cases
from dllm_rl.conformance.algorithms import Subject, learner_for
from dllm_rl.driver.learner_group import deal
from dllm_rl.learner.minibatches import split
from dllm_rl.learner.torch_learner import TorchLearner
from dllm_rl.models.lora import add_lora
from dllm_rl.types import LikelihoodEstimate, TrainingBatch


@pytest.mark.parametrize("number", [1, 2, 3, 7])
@pytest.mark.parametrize("group_size", [1, 2, 3])
def test_every_row_is_in_one_minibatch_and_groups_stay_whole(number, group_size):
    batch = cases.batch(block_causal=False, group_size=group_size)
    parts = split(batch, number)
    assert torch.cat(parts).sort().values.tolist() == list(range(6))
    assert len(parts) == min(number, 6 // group_size)
    assert max(map(len, parts)) - min(map(len, parts)) <= group_size
    for rows in parts:
        assert not set(batch.group[rows].tolist()) & set(batch.group.tolist()) - set(batch.group[rows].tolist())
        others = [row for row in range(6) if row not in rows.tolist()]
        assert not set(batch.group[rows].tolist()) & set(batch.group[others].tolist())
    again = split(batch, number)
    assert all(torch.equal(a, b) for a, b in zip(parts, again, strict=True))


class Recorded(TraceRL):
    """Keeps what its losses saw."""

    def loss(self, new, experience):
        self.seen.append((experience, new.token_logp.detach().clone()))
        return super().loss(new, experience)


def recorded(minibatches, updates=1, budget=1 << 14):
    subject = Subject("trace_rl", {})
    batch, scored = subject.batch(False), subject.scored()
    algorithm = Recorded(subject.algorithm.config)
    algorithm.seen = []
    settings = {"minibatches": minibatches, "updates_per_step": updates, "tokens_per_microbatch": budget}
    learner = learner_for(algorithm.needs, batch, "tiny", **settings)
    masks = subject.masks(batch)
    old = learner.score(batch, masks).token_logp
    metrics = learner.update(TrainingBatch(batch, scored, algorithm.advantages(scored, batch), [masks]), algorithm)
    return algorithm.seen, old, batch, metrics, learner


@pytest.mark.parametrize("budget", [40, 1 << 14])
def test_the_old_policy_is_the_one_before_the_first_update(budget):
    """Of every minibatch; ratios are 1 in the first update and in no other."""
    seen, old, batch, metrics, _ = recorded(2, updates=2, budget=budget)
    assert len(seen) == 4
    first, second = split(batch, 2)
    for (experience, _), rows in zip(seen, (first, second, first, second), strict=True):
        torch.testing.assert_close(experience.old.token_logp, old[rows], atol=1e-6, rtol=0)
        assert experience.counts.num_rows == len(rows) == len(experience.batch)
        assert experience.counts.num_tokens == int(batch.completion[rows].sum())
    off = [(new - experience.old.token_logp).abs().max().item() for experience, new in seen]
    assert off[0] < 1e-5 and min(off[1:]) > 1e-4, off
    assert metrics["log_ratio_deviation"] > 0 and metrics["effective_samples"] < 1


def test_ranks_hold_their_rows_of_every_minibatch():
    batch = cases.batch(block_causal=False, group_size=1)
    scored = cases.rewards(cases.MIXED)
    whole = TrainingBatch(batch, scored, torch.arange(6.0), [Subject("trace_rl", {}).masks(batch)])
    shares = deal(whole, 2, 4)  # three groups of one row on four ranks: one of them idles
    for number, rows in enumerate(split(batch, 2)):
        held = []
        for share in shares:
            part = share.minibatches[number]
            assert part.counts.num_rows == 3 and dataclasses.replace(part.counts, idle=False).num_tokens == int(
                batch.completion[rows].sum()
            )
            assert len(part.rows) >= 1, "an idle rank holds a row that lets it keep step"
            if not part.counts.idle:
                held += share.advantage[part.rows].tolist()
        assert sorted(held) == [float(row) for row in rows]
        assert sum(share.minibatches[number].counts.idle for share in shares) == 1


@pytest.mark.parametrize("budget", [40, 1 << 14])
def test_dropout_touches_neither_the_old_policy_nor_what_the_loss_sees(budget):
    """Both are of the network without dropout, however many micro-batches there are; the gradient has it."""
    subject = Subject("trace_rl", {})
    batch, scored = subject.batch(False), subject.scored()
    algorithm = Recorded(subject.algorithm.config)
    algorithm.seen = []
    learner = learner_for(algorithm.needs, batch, "tiny", tokens_per_microbatch=budget)
    add_lora(learner.denoiser, rank=4, alpha=64.0, dropout=0.5, seed=1)
    with torch.no_grad():
        for name, parameter in learner.denoiser.module.named_parameters():
            if ".lora_B." in name:
                parameter.add_(0.1)
    learner = TorchLearner(
        learner.denoiser,
        cases.tokenizer(),
        learner._config,
        algorithm.needs,
        total_steps=1,
        seed=0,
        dump_folder=Path(tempfile.gettempdir()),
    )
    masks = subject.masks(batch)
    want = learner.score(batch, masks).token_logp
    learner.denoiser.module.train()
    dropped = learner._model.add(
        LikelihoodEstimate.blank(batch), batch, masks, learner._plans(batch, masks)[0], draws=False
    )
    assert (dropped.token_logp - want).abs().max() > 0.01, "dropout acts in training mode"
    learner.update(TrainingBatch(batch, scored, algorithm.advantages(scored, batch), [masks]), algorithm)
    ((experience, new),) = algorithm.seen
    torch.testing.assert_close(experience.old.token_logp, want, atol=1e-5, rtol=0)
    torch.testing.assert_close(new, want, atol=1e-5, rtol=0)
