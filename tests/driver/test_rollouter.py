"""Samples of several turns: what is given is not scored, and an episode counts once, wherever it comes from."""

from __future__ import annotations

import dataclasses
import shutil
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dllm_rl.config.load import load_config
from dllm_rl.conformance import cases
from dllm_rl.driver.build import build_run
from dllm_rl.driver.collect import decode, roll_out
from dllm_rl.driver.decoder import BatchDecoder, PartialBatch
from dllm_rl.driver.prefetch import RolloutPrefetcher
from dllm_rl.errors import UserError
from dllm_rl.reports.clock import Clock
from dllm_rl.reports.progress import Quiet
from dllm_rl.reports.run_folder import comparable, read_rows
from dllm_rl.train import train
from dllm_rl.workers.engine_worker import EngineWorker

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
PLUGIN = '''
from dataclasses import dataclass

from dllm_rl.protocols.rollouter import Rollouter, Turn


class TwoTurns(Rollouter):
    """A tool replies to the first completion of two samples in three, and the model goes on."""

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config:
        reply: str = "21="
        bonus: float | None = None

    def roll_out(self, prompts, decoder, *, samples_per_prompt):
        first = decoder.generate(prompts, samples_per_prompt=samples_per_prompt)
        groups = [row // samples_per_prompt for row in range(len(first))]
        turns = [
            Turn(trajectory=t, prompt=prompts[group], group=group, episode=row)
            for row, (t, group) in enumerate(zip(first, groups))
        ]
        asked = [turn for turn in turns if turn.episode % 3]
        replied = [turn.followed_by(self.config.reply, decoder.tokenizer) for turn in asked]
        assert max(len(prompt.token_ids) for prompt in replied) <= decoder.max_prompt_tokens
        for turn, prompt, t in zip(asked, replied, decoder.generate(replied)):
            turns.append(
                Turn(
                    trajectory=t, prompt=prompt, group=turn.group, episode=turn.episode, turn=1,
                    reward=self.config.bonus,
                )
            )
        return sorted(turns, key=lambda turn: (turn.episode, turn.turn))


class PerTurn(TwoTurns):
    rewarded = "turn"


class OneEpisodeShort(TwoTurns):
    def roll_out(self, prompts, decoder, *, samples_per_prompt):
        return super().roll_out(prompts, decoder, samples_per_prompt=samples_per_prompt - 1)


def ones(prompts, completions, **columns):
    return [float(text.count("1")) for text in completions]


def fails_on_long_prompts(prompts, completions, **columns):
    if any(len(p) > 17 and c.count("1") % 2 for p, c in zip(prompts, completions)):
        raise RuntimeError("no verdict")
    return [float(text.count("1")) for text in completions]
'''


@pytest.fixture(autouse=True)
def package(tmp_path, monkeypatch):
    folder = tmp_path / "packages" / "two_turns"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    (folder / "rollouters.py").write_text(textwrap.dedent(PLUGIN))
    monkeypatch.syspath_prepend(str(folder.parent))
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "two_turns"]:
        del sys.modules[name]


@pytest.fixture
def tiny(tmp_path):
    def make(name, *overrides, rollouter="TwoTurns", reward="ones"):
        return load_config(
            CONFIGS / "tiny_sudoku_ray.yaml",
            [
                f"run.output={tmp_path / name}",
                "run.steps=3",
                "model.init.max_length=64",
                "data.prompts_per_step=4",
                "cluster.kind=local",
                "cluster.engines=1",
                "evaluate.at_end=false",
                "checkpoint.every_steps=1",
                "checkpoint.keep=9",
                "reward_pool.self_test=0",
                "reward_pool.max_failure_fraction=1",
                f"rewards=[{{name: 'two_turns.rollouters:{reward}'}}, {{name: sudoku, weight: 0}}]",
                f"rollout.rollouter.name=two_turns.rollouters:{rollouter}",
                *overrides,
            ],
        )

    return make


@contextmanager
def built(config, folder) -> Iterator:
    with build_run(config, folder / "model", Quiet()) as run, run.reward_pool:
        run.weights.verify()
        yield run


@pytest.fixture
def collected(tiny, tmp_path):
    def make(*overrides, **names):
        config = tiny("run", *overrides, **names)
        with built(config, tmp_path) as run:
            return run, roll_out(run, config, run.source.batch(0), 0, Clock())

    return make


METHODS = ("algorithm={name: coupled_grpo}", "algorithm={name: trace_rl}")


@pytest.mark.parametrize("method", METHODS)
def test_what_was_said_before_is_given_and_never_scored(collected, method):
    run, found = collected(method)
    batch = found.batch
    assert len(batch) == 16 + 10 and batch.turn.sum() == 10
    second = (batch.turn == 1).nonzero().flatten()
    for row in second.tolist():
        before = int(((batch.episode == batch.episode[row]) & (batch.turn == 0)).nonzero())
        assert batch.group[row] == batch.group[before]
        start, end = int(batch.prompt_length[before]), int(batch.prompt_length[row])
        said = batch.tokens[before, batch.completion[before]].tolist()
        reply = run.tokenizer.encode("21=", add_special_tokens=False)
        assert batch.tokens[row, :start].tolist() == batch.tokens[before, :start].tolist()
        assert batch.tokens[row, start:end].tolist() == said + reply
    given = torch.arange(batch.tokens.shape[1]) < batch.prompt_length[:, None]
    masks = run.algorithm.masks(batch, torch.Generator().manual_seed(0))
    assert not batch.completion[given].any() and not batch.behaviour_logp[given].any()
    assert not masks.weight[:, given].any() and not masks.mask[:, given].any()
    assert masks.weight[:, batch.completion].any()
    advantage = run.algorithm.advantages(found.rewards, batch)
    old = cases.estimate(batch, masks, run.algorithm.needs, seed=1)
    reference = cases.estimate(batch, masks, run.algorithm.needs, seed=2)
    noise = torch.where(
        batch.valid, cases.estimate(batch, masks, run.algorithm.needs, seed=3).token_logp - 0.5, 0.0
    ).requires_grad_()
    new = dataclasses.replace(old, token_logp=noise)
    experience = cases.experience(batch, found.rewards, advantage, masks, old, reference)
    run.algorithm.loss(new, experience).value.backward()
    assert noise.grad[batch.completion].any() and not noise.grad[~batch.completion].any()


def test_the_reward_of_an_episode_reaches_its_turns_and_counts_once(collected):
    _, found = collected("algorithm={name: coupled_grpo}")
    batch, total = found.batch, found.rewards.total
    ones = [row["completion"].count("1") for row in found.samples]
    last = {e: row for row, e in enumerate(batch.episode.tolist())}
    assert total.tolist() == [ones[last[e]] for e in batch.episode.tolist()]
    assert any(ones[row] != total[row] for row in range(len(batch))), "first turns have rewards of the last"
    reward = {e: total[row].item() for e, row in last.items()}
    assert found.metrics["reward"] == pytest.approx(sum(reward.values()) / 16)
    groups = {g: sorted(set(batch.episode[batch.group == g].tolist())) for g in range(4)}
    assert all(len(episodes) == 4 for episodes in groups.values())


@pytest.mark.parametrize("method", METHODS)
def test_baselines_are_means_over_episodes(collected, method):
    run, found = collected(method)
    batch, total = found.batch, found.rewards.total
    reward = dict(zip(batch.episode.tolist(), total.tolist(), strict=True))
    got = run.algorithm.advantages(found.rewards, batch)
    for row in range(len(batch)):
        episodes = sorted(set(batch.episode[batch.group == batch.group[row]].tolist()))
        others = [reward[e] for e in episodes if e != batch.episode[row]]
        mean = sum(reward[e] for e in episodes) / len(episodes)
        variance = sum((reward[e] - mean) ** 2 for e in episodes) / len(episodes)
        want = total[row].item() - sum(others) / 3
        if "trace_rl" in method:
            want = (total[row].item() - mean) / variance**0.5 if variance else 0.0
        assert got[row].item() == pytest.approx(want, abs=1e-5)


def test_rewards_per_turn_and_of_the_rollouter(collected):
    _, found = collected("rollout.rollouter.bonus=0.5", rollouter="PerTurn")
    ones = [row["completion"].count("1") for row in found.samples]
    assert found.rewards.total.tolist() == [n + 0.5 * row["turn"] for n, row in zip(ones, found.samples, strict=True)]
    given = found.rewards.components["environment"]
    assert given.isnan().tolist() == (found.batch.turn == 0).tolist()
    assert found.metrics["reward/environment"] == 0.5
    means = [found.rewards.total[found.batch.episode == e].mean().item() for e in range(16)]
    assert found.metrics["reward"] == pytest.approx(sum(means) / 16)


def test_a_failed_verification_excludes_the_whole_episode(collected):
    run, found = collected(rollouter="PerTurn", reward="fails_on_long_prompts")
    batch, rewards = found.batch, found.rewards
    ones = torch.tensor([row["completion"].count("1") for row in found.samples])
    failed = set(batch.episode[(batch.turn == 1) & (ones % 2 == 1)].tolist())
    assert 0 < len(failed) < 10
    out = torch.tensor([e in failed for e in batch.episode.tolist()])
    assert torch.equal(rewards.included, ~out) and not rewards.solved[out].any() and not rewards.total[out].any()
    assert {rewards.status[row] for row in out.nonzero().flatten().tolist()} == {"error"}
    assert not run.algorithm.advantages(rewards, batch)[out].any()
    assert not run.algorithm.keep(rewards, batch)[out].any()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("lead", [0, 1])
def test_a_run_learns_and_resumes_with_the_same_bits(tiny, method, lead):
    changes = (method, f"rollout.max_staleness={lead}", "run.log_samples=3")
    whole = train(tiny("whole", *changes)).folder
    assert (whole / "checkpoints" / "step-000001" / "prefetched.pt").exists() == bool(lead)
    config = tiny("resumed", *changes)
    folder = Path(config.run.output) / config.run.name
    shutil.copytree(whole, folder)
    train(config, from_checkpoint="step-000001")
    assert comparable(folder) == comparable(whole)
    assert all(row["loss"] != 0 for row in comparable(whole))
    one, other = (load_file(next(f.glob("checkpoints/step-000003/model/*.safetensors"))) for f in (whole, folder))
    assert all(torch.equal(one[name], other[name]) for name in one)
    samples = list(read_rows(whole / "samples.jsonl"))
    assert [(row["episode"], row["turn"]) for row in samples] == [(0, 0), (1, 0), (1, 1)] * 3
    assert samples[2]["prompt"].startswith(samples[1]["prompt"] + samples[1]["completion"])


def equal(one, other) -> bool:
    return all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        for a, b in zip(dataclasses.astuple(one), dataclasses.astuple(other), strict=True)
    )


def test_a_batch_that_waits_survives_a_checkpoint_and_older_files_load(tiny, tmp_path):
    config = tiny("run", "rollout.max_staleness=1")
    with built(config, tmp_path) as run:
        with RolloutPrefetcher(run, config) as prefetcher:
            prefetcher.get(0)
            want = prefetcher._batches[1].result()
            prefetcher.save(tmp_path)
        file = tmp_path / "prefetched.pt"
        with RolloutPrefetcher(run, config) as prefetcher:
            prefetcher.load(tmp_path, 0)
            got = prefetcher._batches[1].result()
            assert equal(got.batch, want.batch) and got.batch.turn.any()
            assert torch.equal(got.rewards.total, want.rewards.total) and got.samples == want.samples
            saved = torch.load(file, weights_only=True)
            del saved["waiting"][1]["batch"]["episode"], saved["waiting"][1]["batch"]["turn"]
            torch.save(saved, file)
            prefetcher.load(tmp_path, 0)
            older = prefetcher._batches[1].result().batch
            assert torch.equal(older.episode, torch.arange(len(older))) and not older.turn.any()
            saved["waiting"][1]["batch"]["colour"] = torch.zeros(len(older))
            torch.save(saved, file)
            with pytest.raises(UserError, match=r"another version of dllm-rl.*colour"):
                prefetcher.load(tmp_path, 0)


def test_a_begun_batch_of_two_turns_goes_on_where_it_was(tiny, tmp_path):
    config = tiny("run", "rollout.max_staleness=2", "sampling.block_size=4")
    config = config.model_copy(update={"rollout": config.rollout.model_copy(update={"pause_blocks": 1})})
    with built(config, tmp_path) as run:
        prompts = run.source.batch(1)
        whole = roll_out(run, config, prompts, 1, Clock()).batch
        partial, stops = PartialBatch(), iter([False] * 5 + [True])

        @contextmanager
        def engines():
            if next(stops):
                raise InterruptedError
            yield

        with pytest.raises(
            UserError, match=r"roll_out\(\) raised InterruptedError"
        ):  # the first turn takes four calls: the second has had one of them
            decode(run, config, prompts, BatchDecoder(run, config, 1, partial, engines))
        assert len(partial.trajectories) == 16 + 10 and partial.blocks == 1
        assert any(t.finish == "paused" for t in partial.trajectories[16:])
        with RolloutPrefetcher(run, config) as prefetcher:
            prefetcher._partial[1] = partial
            prefetcher.save(tmp_path)
            prefetcher.load(tmp_path, 0)
            run.engines.weights = dataclasses.replace(run.engines.weights, step=1)
            run.engines.group.call(EngineWorker.activate, run.engines.weights)
            begun = prefetcher._partial[1]
            batch = prefetcher._collect(1, begun).batch
        assert torch.equal(batch.tokens, whole.tokens) and torch.equal(batch.episode, whole.episode)
        fresh = batch.weights_step == 1
        assert not fresh[batch.turn == 0].any(), "the first turn was decoded, and is not again"
        early = torch.arange(batch.tokens.shape[1]) < batch.prompt_length[:, None] + 4
        assert torch.equal(fresh[batch.generated], (~early & (batch.turn == 1)[:, None])[batch.generated])
        # A tool that answers otherwise than before: what was decoded after its former answer is of no use.
        other = tiny("run", "sampling.block_size=4", "rollout.rollouter.reply=4=")
        with built(other, tmp_path) as changed:
            want = roll_out(changed, other, prompts, 1, Clock()).batch
            turns = decode(changed, other, prompts, BatchDecoder(changed, other, 1, partial))
            ends = [turn.trajectory.tokens for turn in turns]
            assert all(torch.equal(row, want.tokens[i, : len(row)]) for i, row in enumerate(ends))


def test_too_few_episodes_stop_the_run(tiny):
    with pytest.raises(UserError, match="must be 4"):
        train(tiny("run", rollouter="OneEpisodeShort"))


@pytest.mark.parametrize(
    ("method", "why"), [("vrpo_tiny", "trains on pairs"), ("igpo_tiny", "asks for further completions")]
)
def test_algorithms_that_need_single_turns_say_so(tmp_path, method, why):
    overrides = [f"run.output={tmp_path}", "rollout.rollouter.name=two_turns.rollouters:TwoTurns"]
    with pytest.raises(UserError, match=why):
        train(load_config(CONFIGS / "methods" / f"{method}.yaml", overrides))
