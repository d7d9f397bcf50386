"""Whole runs on a private Ray cluster against the same runs in one process."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from dllm_rl.driver.engine_pool import EnginePool
from dllm_rl.driver.learner_group import LearnerGroup
from dllm_rl.reports.run_folder import comparable, read_rows
from dllm_rl.train import train

ROOT = Path(__file__).resolve().parents[2]
LOCAL = ("cluster.kind=local", "cluster.engines=1")


def weights(folder, step=5):
    return load_file(next(folder.glob(f"checkpoints/step-{step:06d}/model/*.safetensors")))


def assert_same_bits(first, second):
    one, other = weights(first), weights(second)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """A run of five steps with LoRA in this process; all checkpoints are kept."""
    from dllm_rl.config.load import load_config

    output = tmp_path_factory.mktemp("local")
    overrides = [f"run.output={output}", "run.steps=5", "checkpoint.keep=9", "model.lora.rank=4", *LOCAL]
    folder = train(load_config(ROOT / "configs" / "tiny_sudoku_ray.yaml", overrides)).folder
    assert all(row["grad_norm"] > 0 for row in comparable(folder) if "grad_norm" in row), "or nothing would be compared"
    first, last = weights(folder, 2), weights(folder)
    assert any(not torch.equal(first[name], last[name]) for name in first)
    return folder


def test_a_cluster_gives_the_bits_of_one_process(one_process, tiny, ray_cluster):
    """With engines that make room for the learner in between."""
    folder = train(tiny("model.lora.rank=4", "checkpoint.keep=9", "cluster.colocate=true", "cluster.sleep=true")).folder
    assert comparable(folder) == comparable(one_process)
    assert_same_bits(folder, one_process)
    assert all("sleep_s" in row for row in read_rows(folder / "metrics.jsonl") if row.get("grad_norm"))
    ledgers = [list(read_rows(f / "ledger.jsonl")) for f in (folder, one_process)]
    used = next(iter(read_rows(folder / "metrics.jsonl")))
    for name in ("engine-0", "engine-1", "learner-0"):
        assert used[f"usage/{name}/rss_mb"] > 50 and used[f"usage/{name}/cpu_percent"] >= 0
        assert 0 < used[f"usage/{name}/busy_percent"] <= 100
    assert ledgers[0] == ledgers[1] and [row["step"] for row in ledgers[0]] == [1, 2, 3, 4, 5]


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_engines_and_gives_the_same_bits(one_process, tiny, ray_cluster):
    config = tiny("model.lora.rank=4", "checkpoint.keep=9", "cluster.engines=1", "cluster.transport=object_store")
    folder = Path(config.run.output) / config.run.name
    shutil.copytree(one_process, folder)
    train(config, from_checkpoint="step-000002")
    assert_same_bits(folder, one_process)
    assert comparable(folder) == comparable(one_process)


@pytest.mark.slow
def test_two_zero_3_ranks_learn_what_one_process_learns(tiny, ray_cluster):
    changes = ("algorithm={name: masked_sft}", "data.prompts_per_step=6", "learner.tokens_per_microbatch=256")
    alone = train(tiny(*changes, *LOCAL)).folder
    more = ("cluster.engines=1", "cluster.learners=2", "learner.backend=deepspeed", "learner.zero_stage=3")
    sharded = "learner.zero_options={stage3_param_persistence_threshold: 0}"  # small parameters too
    ranks = train(tiny(*changes, *more, sharded)).folder
    one, other = weights(alone), weights(ranks)
    assert all(torch.allclose(one[name], other[name], rtol=0, atol=1e-6) for name in one)
    for mine, its in zip(comparable(alone), comparable(ranks), strict=True):
        assert mine == pytest.approx(its, rel=1e-4, abs=1e-6)


def test_ranks_go_on_as_one_process_of_another_size(tiny, ray_cluster):
    """A checkpoint of two ZeRO-2 ranks, loaded by one rank: DeepSpeed's universal layout."""
    changes = ("algorithm={name: masked_sft}", "data.prompts_per_step=6", "checkpoint.keep=9", "cluster.engines=1")
    more = (*changes, "learner.backend=deepspeed", "learner.zero_stage=2")
    two = train(tiny(*more, "cluster.learners=2")).folder
    config = tiny(*more, "cluster.learners=1")
    folder = Path(config.run.output) / config.run.name
    shutil.copytree(two, folder)
    assert train(config, from_checkpoint="step-000002").steps == 5
    one, other = weights(two), weights(folder)
    assert all(torch.allclose(one[name], other[name], rtol=0, atol=1e-6) for name in one)
    for mine, its in zip(comparable(two), comparable(folder), strict=True):
        assert mine == pytest.approx(its, rel=1e-4, abs=1e-6)


def test_decoding_ahead_on_a_cluster_resumes_with_the_bits_of_one_process(tiny, ray_cluster):
    changes = ("rollout.max_staleness=1", "rollout.correction=token", "checkpoint.keep=9")
    whole = train(tiny(*changes, *LOCAL)).folder
    config = tiny(*changes)
    folder = Path(config.run.output) / config.run.name
    shutil.copytree(whole, folder)
    train(config, from_checkpoint="step-000002")
    assert comparable(folder) == comparable(whole)
    assert_same_bits(folder, whole)


def test_a_policy_that_is_trained_reaches_its_engines(tiny, ray_cluster, tmp_path):
    """The model stays; the network that unmasks is what is pushed."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"{number} + 1 =", "answer": "2"}) + "\n" for number in range(48)))
    changes = (
        *("algorithm={name: unmasking_policy}", "sampling.strategy={name: learned, width: 16}"),
        *("sampling.temperature=0", "run.steps=3", "learner.lr=1.0e-2", "reward_pool.self_test=0"),
        f"data.task={{name: jsonl, train_file: {rows}, success: format}}",
        *('rewards=[{name: format, pattern: "."}]', "evaluate.at_end=false"),  # all are right, some are fast
        *("checkpoint={every_steps: 1, keep: 9}", "model.init.tokenizer=byte_bpe", "model.init.vocab_size=300"),
    )
    alone, cluster = train(tiny(*changes, *LOCAL)).folder, train(tiny(*changes)).folder
    assert comparable(cluster) == comparable(alone)
    one, other = weights(alone, 3), weights(cluster, 3)
    first = weights(alone, 2)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert any(not torch.equal(first[name], one[name]) for name in one), "or nothing would be compared"


class Stops:
    """Suspends a worker of a run once, when it has made progress."""

    def __init__(self, monkeypatch, owner, method):
        self.pid, original = None, getattr(owner, method)

        def stopping(of, *arguments, **options):
            self.calls += 1
            if self.calls == 3:
                rank = of.group.size - 1
                heartbeat = of.group.heartbeat(rank).result(60)
                self.pid = heartbeat.pid
                os.kill(self.pid, signal.SIGSTOP)
            return original(of, *arguments, **options)

        self.calls = 0
        monkeypatch.setattr(owner, method, stopping)


@pytest.mark.parametrize(("owner", "method"), [(EnginePool, "generate"), (LearnerGroup, "update")])
def test_who_hangs_is_ended_and_built_anew(one_process, tiny, ray_cluster, monkeypatch, owner, method):
    """A stopped process answers nothing, and its connections stay open: only a deadline finds it."""
    monkeypatch.setattr("dllm_rl.driver.engine_pool.HEARTBEAT_S", 0.5)
    monkeypatch.setattr("dllm_rl.driver.learner_group.HEARTBEAT_S", 0.5)
    monkeypatch.setattr("dllm_rl.cluster.watchdog.HEARTBEAT_S", 0.5)
    stops = Stops(monkeypatch, owner, method)
    folder = train(tiny("model.lora.rank=4", "checkpoint.keep=9", "cluster.hang_s=2")).folder
    assert stops.pid is not None and not psutil.pid_exists(stops.pid)
    assert_same_bits(folder, one_process)


def test_completions_pause_for_new_weights_and_go_on_under_them(tiny, ray_cluster):
    config = tiny(
        *("rollout.max_staleness=2", "rollout.pause_blocks=1", "rollout.correction=token", "sampling.block_size=2"),
        *("run.steps=12", "sampling.tokens_per_step=1", "checkpoint.every_steps=null", "evaluate.at_end=false"),
        "evaluate.every_steps=5",
    )
    asked = iter([False] * 6 + [True])
    folder = train(config, stop=lambda: next(asked, False)).folder
    saved = torch.load(next(folder.glob("checkpoints/step-000006/prefetched.pt")), weights_only=True)
    assert saved["partial"] or saved["waiting"], "decoding went on while the sixth step was learned"
    assert train(config, resume=True).steps == 12
    ledger = list(read_rows(folder / "ledger.jsonl"))
    steps = [row["step"] for row in ledger]
    assert steps == list(range(1, 13)), "the steps before the pause are not repeated"
    prompts = [uid for row in ledger for uid in row["uids"]]
    assert len(prompts) == 12 * 16 == len(set(prompts)), "none lost, none twice"
    assert all(0 <= step - 1 - row["weights_step"] <= 2 for step, row in zip(steps, ledger, strict=True))
    learned = [row for row in comparable(folder) if "staleness" in row]
    assert all(0 <= row["staleness"] <= 2 for row in learned)
    assert any(row["paused_rows"] > 0 for row in learned), "no completion was decoded by two versions of the weights"
