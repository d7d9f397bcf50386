"""Dynamic sampling: flat groups make way for those of other prompts, in the same batches whatever decodes them."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch

from dllm_rl import seeding
from dllm_rl.diffusion.advantage import share_of_group
from dllm_rl.driver.build import build_run
from dllm_rl.driver.collect import roll_out
from dllm_rl.driver.decoder import PartialBatch
from dllm_rl.driver.prefetch import RolloutPrefetcher
from dllm_rl.reports.clock import Clock
from dllm_rl.reports.progress import Quiet
from dllm_rl.reports.run_folder import comparable, read_rows
from dllm_rl.tasks.sudoku import Sudoku4
from dllm_rl.train import train
from dllm_rl.workers.engine_worker import EngineWorker

LOCAL = ("cluster.kind=local", "cluster.engines=1", "reward_pool.self_test=0", "evaluate.at_end=false")
FEW = (
    "data.prompts_per_step=8",
    "rewards=[{name: 'light_rewards:apart_for_some'}, {name: sudoku, weight: 0}]",
)


class Easy(Sudoku4):
    """Sudoku that everybody solves."""

    success = "light_rewards:right"


class Halves(Sudoku4):
    """Sudoku whose success is a coin."""

    success = "light_rewards:half"


@pytest.fixture(autouse=True)
def rewards(monkeypatch):
    for folder in (Path(__file__).parents[1], Path(__file__).parent):
        monkeypatch.syspath_prepend(str(folder))
        monkeypatch.setenv("PYTHONPATH", str(folder), prepend=":")


@pytest.fixture
def collected(tiny, tmp_path):
    """collected(*overrides, step) -> what a step of a random model gives, and the run's algorithm."""

    def make(*overrides, step=0):
        config = tiny(*LOCAL, *FEW, *overrides)
        with build_run(config, tmp_path / "model", Quiet()) as run, run.reward_pool:
            run.weights.verify()
            return roll_out(run, config, run.source.batch(step), step, Clock())

    return make


def groups(found):
    """uid -> tokens of the group's rows."""
    return {uid: found.batch.tokens[found.batch.group == g].tolist() for g, uid in enumerate(found.uids)}


def test_flat_groups_are_replaced_and_the_others_stay(collected):
    six = "data.samples_per_prompt=6"  # of which the mean of equal rewards rounds
    plain, more = collected(six), collected(six, "data.resample_flat_groups=4")
    flat = plain.metrics["zero_variance_groups"]
    assert 0 < flat < 1 and "flat_groups" not in plain.metrics
    assert more.metrics | plain.metrics == more.metrics, "of the prompts whose turn it is, as without it"
    assert more.metrics["flat_groups"] == flat and more.metrics["resampled/flat_groups"] == 0
    assert more.metrics["resampled/zero_variance_groups"] == 0
    assert 1 < more.metrics["resample_rounds"] <= 4 and more.metrics["resample_prompts"] > flat * 8
    assert len(set(more.uids)) == 8 and more.batch.group.tolist() == plain.batch.group.tolist()
    before, after = groups(plain), groups(more)
    stayed = before.keys() & after.keys()
    assert len(stayed) == round(8 * (1 - flat)) and all(before[uid] == after[uid] for uid in stayed)
    assert [before_uid for before_uid in plain.uids if before_uid in stayed] == [u for u in more.uids if u in stayed]
    assert [sample["uid"] for sample in more.samples] == [uid for uid in more.uids for _ in range(6)]
    assert [sample["reward"] for sample in more.samples] == pytest.approx(more.rewards.total.tolist())
    assert len(more.batch.episode.unique()) == 48


def test_one_round_may_not_be_enough_and_none_is_when_nothing_differs(collected):
    once = collected("data.resample_flat_groups=1").metrics
    assert once["resample_rounds"] == 1 and 0 < once["resampled/flat_groups"] < once["flat_groups"]
    same = ("rewards=[{name: 'light_rewards:right'}]",)
    plain, never = collected(*same), collected(*same, "data.resample_flat_groups=2")
    assert never.metrics["resample_rounds"] == 2 and never.metrics["resample_prompts"] == 16
    assert never.metrics["flat_groups"] == never.metrics["resampled/flat_groups"] == 1
    assert groups(never) == groups(plain) and never.uids == plain.uids


def test_a_round_draws_no_prompt_twice_and_every_step_others(collected):
    drawn = [collected("data.resample_flat_groups=3", step=step).uids for step in (0, 1, 0)]
    assert drawn[0] == drawn[2] and not set(drawn[0]) >= set(drawn[1])
    few = collected("data.resample_flat_groups=9", "data.task.train_puzzles=8")
    assert few.metrics["resample_rounds"] == 0, "all there are have had their turn"


def test_what_teaches_speed_is_not_flat(collected):
    fast = ("algorithm={name: lightning_rl}", "sampling.strategy={name: confidence_threshold, threshold: 0.15}")
    solved = ("data.task.name=test_resample:Easy", "rewards=[{name: 'light_rewards:right'}]")
    found = collected(*fast, *solved, "data.resample_flat_groups=1").metrics
    assert found["zero_variance_groups"] == 1 and found["flat_groups"] < 1


def test_groups_of_an_accuracy_are_kept_and_others_replaced(collected, tiny):
    coin = ("data.task.name=test_resample:Halves", "rewards=[{name: 'light_rewards:half'}]")
    between = (*coin, "data.keep_accuracy=[0.4, 0.6]")
    found = collected(*between, "data.resample_flat_groups=4")
    batch, rewards = found.batch, found.rewards
    share = share_of_group(rewards.solved, batch.group, rewards.included)
    flat = share.view(8, 4)[:, 0] != 0.5
    assert found.metrics["flat_groups"] > 0 and found.metrics["resampled/flat_groups"] == flat.float().mean()
    assert found.metrics["resampled/flat_groups"] < found.metrics["flat_groups"]
    (row,) = comparable(train(tiny(*LOCAL, *FEW, *between, "run.steps=1")).folder)
    assert 0 < row["kept_rows"] < 1 - row["zero_variance_groups"], "of the groups that differ, not all"


def test_share_of_group_counts_samples():
    flag, group = torch.tensor([1, 1, 0, 1, 0, 1]).bool(), torch.tensor([0, 0, 0, 1, 1, 1])
    included, episode = torch.tensor([True] * 5 + [False]), torch.tensor([0, 0, 1, 2, 3, 4])
    assert share_of_group(flag, group, included, episode).tolist() == [0.5] * 6


@pytest.mark.parametrize("lead", [0, 2])
def test_a_resumed_run_has_the_same_bits(tiny, lead):
    changes = (*LOCAL, *FEW, "data.resample_flat_groups=2", f"rollout.max_staleness={lead}", "run.steps=4")
    changes += ("checkpoint.every_steps=1", "checkpoint.keep=9")
    whole = train(tiny(*changes)).folder
    assert any(row["resample_rounds"] == 2 for row in comparable(whole))
    config = tiny(*changes)
    folder = Path(config.run.output) / config.run.name
    shutil.copytree(whole, folder)
    train(config, from_checkpoint="step-000002")
    assert comparable(folder) == comparable(whole)
    ledgers = [list(read_rows(f / "ledger.jsonl")) for f in (folder, whole)]
    assert ledgers[0] == ledgers[1]


def test_a_round_that_paused_goes_on_after_a_resume(tiny, tmp_path):
    config = tiny(*LOCAL, *FEW, "data.resample_flat_groups=2", "rollout.max_staleness=2", "sampling.block_size=4")
    config = config.model_copy(update={"rollout": config.rollout.model_copy(update={"pause_blocks": 1})})
    with build_run(config, tmp_path / "model", Quiet()) as run, run.reward_pool:
        run.weights.verify()
        whole = roll_out(run, config, run.source.batch(1), 1, Clock())
        assert whole.metrics["resample_rounds"] == 2
        key, options = seeding.derive(config.run.seed, "rollout", 1), {"samples_per_prompt": 4}
        ordinary = run.engines.generate(run.source.batch(1), run.sampling, seed=key, **options)
        met = {prompt.uid for prompt in run.source.batch(1)}
        missing = round(8 * whole.metrics["flat_groups"])
        fresh = [prompt for prompt in run.spare.batch(2) if prompt.uid not in met][:missing]
        begun = run.engines.generate(fresh, run.sampling, seed=key, **options, max_blocks=1)
        assert any(trajectory.finish == "paused" for trajectory in begun)
        with RolloutPrefetcher(run, config) as prefetcher:
            prefetcher._partial[1] = PartialBatch([*ordinary, *begun], 1)
            prefetcher.save(tmp_path)
        with RolloutPrefetcher(run, config) as prefetcher:
            prefetcher.load(tmp_path, 0)
            newer = dataclasses.replace(run.engines.weights, step=1)
            run.engines.group.call(EngineWorker.activate, newer)
            run.engines.weights = newer
            batch = prefetcher._collect(1, prefetcher._partial[1]).batch
    assert torch.equal(batch.tokens, whole.batch.tokens)
    steps = [set(batch.weights_step[batch.generated & (batch.group == group)[:, None]].tolist()) for group in range(8)]
    assert {0} in steps and {0, 1} in steps, "some groups are of before the resume, some went on after it"


@pytest.mark.slow
def test_a_cluster_that_decodes_ahead_gives_the_bits_of_one_process(tiny, ray_cluster):
    changes = (*FEW, "data.resample_flat_groups=2", "rollout.max_staleness=1", "run.steps=3", *LOCAL[2:])
    cluster, local = (train(tiny(*changes, *where)).folder for where in ((), LOCAL[:2]))
    assert comparable(cluster) == comparable(local)


@pytest.mark.parametrize(
    ("algorithm", "why"),
    [
        ("{name: vrpo}", "compares samples of a prompt, and algorithm 'vrpo' trains on pairs; set it to 0"),
        ("{name: trace_rl, value: true}", "compares samples of a prompt, and algorithm 'trace_rl' has a value model"),
        ("{name: igpo}", "replaces groups, and algorithm 'igpo' asks for further completions of their prompts"),
    ],
)
def test_methods_without_groups_of_their_own_refuse_it(tiny, algorithm, why):
    with pytest.raises(ValueError, match=f"data.resample_flat_groups = 2 {why}"):
        train(tiny(*LOCAL, f"algorithm={algorithm}", "data.resample_flat_groups=2"))


def test_an_accuracy_out_of_range_is_refused(tiny):
    with pytest.raises(ValueError, match=r"keep_accuracy = \(0.8, 0.2\): need 0 <= low <= high <= 1"):
        tiny("data.keep_accuracy=[0.8, 0.2]")
    with pytest.raises(ValueError, match=r"data.keep_accuracy = \(0.2, 0.8\) .* algorithm 'vrpo' trains on pairs"):
        train(tiny(*LOCAL, "algorithm={name: vrpo}", "data.keep_accuracy=[0.2, 0.8]"))
