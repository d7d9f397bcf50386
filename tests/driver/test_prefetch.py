"""Decoding ahead of learning: which weights decode which batch, and runs that resume with the same bits."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dllm_rl import seeding
from dllm_rl.config.load import load_config
from dllm_rl.diffusion.staleness import truncated_weights
from dllm_rl.driver.build import build_run
from dllm_rl.driver.collect import roll_out
from dllm_rl.driver.decoder import PartialBatch
from dllm_rl.driver.prefetch import RolloutPrefetcher
from dllm_rl.reports.clock import Clock
from dllm_rl.reports.progress import Quiet
from dllm_rl.reports.run_folder import comparable, read_rows
from dllm_rl.storage import checkpoint
from dllm_rl.train import train
from dllm_rl.workers.engine_worker import EngineWorker

TINY = Path(__file__).resolve().parents[2] / "configs" / "tiny_sudoku_ray.yaml"


@pytest.fixture
def tiny(tmp_path):
    def make(name, *overrides):
        local = ("cluster.kind=local", "cluster.engines=1", "evaluate.at_end=false", "checkpoint.every_steps=1")
        return load_config(
            TINY, [f"run.output={tmp_path / name}", "run.steps=6", "checkpoint.keep=9", *local, *overrides]
        )

    return make


def weights(folder):
    return load_file(next(folder.glob("checkpoints/step-000006/model/*.safetensors")))


@pytest.mark.parametrize("lead", [0, 1, 3])
def test_a_batch_is_decoded_with_weights_that_are_exactly_so_old(tiny, lead):
    folder = train(tiny("run", f"rollout.max_staleness={lead}")).folder
    ledger = list(read_rows(folder / "ledger.jsonl"))
    assert [row["weights_step"] for row in ledger] == [max(0, step - lead) for step in range(6)]
    prompts = [uid for row in ledger for uid in row["uids"]]
    assert len(prompts) == 6 * 16 == len(set(prompts)), "none twice in the first epoch, none lost"
    if lead:
        assert [row["staleness"] for row in comparable(folder)] == [min(step, lead) for step in range(6)]


@pytest.mark.parametrize("begin", [1, 4])
def test_a_stale_run_resumes_with_the_same_bits(tiny, begin):
    changes = ("rollout.max_staleness=2", "rollout.correction=token")
    whole = train(tiny("whole", *changes)).folder
    config = tiny("resumed", *changes)
    folder = Path(config.run.output) / config.run.name
    shutil.copytree(whole, folder)
    train(config, from_checkpoint=f"step-{begin:06d}")
    assert comparable(folder) == comparable(whole)
    one, other = weights(whole), weights(folder)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_what_waits_is_dropped_where_less_staleness_is_allowed(tiny):
    whole = train(tiny("run", "rollout.max_staleness=2")).folder
    root = whole / "checkpoints"
    assert (checkpoint.find(root, "step-000002") / "prefetched.pt").is_file()
    assert not (checkpoint.find(root, "step-000006") / "prefetched.pt").exists(), "nothing waits at the end"
    again = train(tiny("run", "rollout.max_staleness=0"), from_checkpoint="step-000002").folder
    assert [row["weights_step"] for row in read_rows(again / "ledger.jsonl")] == [0, 0, 2, 3, 4, 5]


def test_a_begun_batch_goes_on_after_a_resume(tiny, tmp_path):
    config = tiny("run", "rollout.max_staleness=2", "sampling.block_size=4")
    config = config.model_copy(update={"rollout": config.rollout.model_copy(update={"pause_blocks": 1})})
    with build_run(config, tmp_path / "model", Quiet()) as run, run.reward_pool:
        run.weights.verify()
        prompts, whole = run.source.batch(1), roll_out(run, config, run.source.batch(1), 1, Clock())
        key = seeding.derive(config.run.seed, "rollout", 1)
        first = run.engines.generate(prompts, run.sampling, seed=key, samples_per_prompt=4, max_blocks=1)
        assert all(t.finish == "paused" for t in first if t.completion_length == 16)
        with RolloutPrefetcher(run, config) as prefetcher:
            prefetcher._partial[1] = PartialBatch(first, 1)
            prefetcher.save(tmp_path)
        with RolloutPrefetcher(run, config) as prefetcher:
            prefetcher.load(tmp_path, 0)
            assert prefetcher._partial[1].blocks == 1
            newer = dataclasses.replace(run.engines.weights, step=1)
            run.engines.group.call(EngineWorker.activate, newer)
            run.engines.weights = newer
            batch = prefetcher._collect(1, prefetcher._partial[1]).batch
        assert torch.equal(batch.tokens, whole.batch.tokens)
        early = (torch.arange(batch.tokens.shape[1]) < batch.prompt_length[:, None] + 4) & batch.generated
        assert torch.equal(batch.weights_step[batch.generated], (~early)[batch.generated].long())
        with RolloutPrefetcher(run, config) as prefetcher:
            prefetcher.load(tmp_path, 4)
            assert not prefetcher._partial, "its weights are too old by now"


def test_correction_changes_stale_steps_only(tiny):
    stale = ("rollout.max_staleness=1",)
    plain = comparable(train(tiny("plain", *stale)).folder)
    for level in ("token", "sequence"):
        corrected = comparable(train(tiny(level, *stale, f"rollout.correction={level}")).folder)
        assert corrected[0] == plain[0] and "stale_ratio" not in corrected[0], "the first batch is fresh"
        assert corrected[1]["loss"] != plain[1]["loss"]
        assert corrected[1]["stale_ratio"] > 0
        slow = (f"rollout.correction={level}", "learner.lr=1.0e-12")
        still = comparable(train(tiny(f"still-{level}", *stale, *slow)).folder)
        assert all(row["stale_ratio"] == pytest.approx(1, abs=1e-4) for row in still[1:] if "stale_ratio" in row)
    fresh = comparable(train(tiny("fresh", "rollout.correction=token")).folder)
    assert not any("stale_ratio" in row for row in fresh)


def test_a_correction_is_one_of_the_probabilities_with_which_tokens_are_drawn(tiny):
    stale = ("rollout.max_staleness=1", "rollout.correction=token", "rollout.correction_cap=1.0e+9")
    sampled = ("sampling.temperature=0.6", "sampling.top_k=5", "sampling.top_p=0.9")
    still = comparable(train(tiny("still", *stale, *sampled, "learner.lr=1.0e-12")).folder)
    ratios = [row["stale_ratio"] for row in still if "stale_ratio" in row]
    assert ratios and ratios == pytest.approx([1.0] * len(ratios), abs=1e-4)
    moved = comparable(train(tiny("moved", *stale, *sampled)).folder)
    other = comparable(train(tiny("other", *stale, "sampling.temperature=0.6")).folder)
    ratios = [row["stale_ratio"] for row in [*moved, *other] if "stale_ratio" in row]
    assert all(abs(ratio - 1) > 1e-3 for ratio in ratios), ratios


def test_a_token_that_would_not_be_drawn_any_more_counts_nothing(tiny_batch):
    batch = dataclasses.replace(tiny_batch, sampled_logp=tiny_batch.behaviour_logp / 2)
    first = batch.generated.nonzero()[0]
    now = batch.sampled_logp.clone()
    now[first[0], first[1]] = -torch.inf
    factor, figures = truncated_weights(now, batch, cap=2.0, level="token")
    assert factor[first[0], first[1]] == 0 and figures["stale_ratio"] < 1
    assert factor.sum() == factor.numel() - 1, "all others are as likely as they were"
    whole, _ = truncated_weights(now, batch, cap=2.0, level="sequence")
    assert whole[first[0]] == 0 and whole.sum() == len(batch) - 1


def test_truncated_weights_by_hand(tiny_batch):
    batch = tiny_batch
    now = batch.behaviour_logp + torch.where(batch.generated, torch.tensor(3.0).log(), 7.0)
    factor, figures = truncated_weights(now, batch, cap=2.0, level="token")
    assert torch.equal(factor[batch.generated], torch.full((int(batch.generated.sum()),), 2.0))
    assert torch.equal(factor[~batch.generated], torch.ones(int((~batch.generated).sum())))
    assert figures["stale_ratio"] == pytest.approx(3.0) and figures["stale_truncated"] == 1.0
    now = batch.behaviour_logp - 0.25 * batch.generated
    factor, figures = truncated_weights(now, batch, cap=2.0, level="sequence")
    assert torch.allclose(factor, (-0.25 * batch.generated.sum(-1)).exp())
    assert figures["stale_truncated"] == 0.0


@pytest.fixture
def tiny_batch():
    from dllm_rl.conformance import cases

    return cases.batch(block_causal=False)
