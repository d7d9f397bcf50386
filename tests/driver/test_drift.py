"""Runs whose model becomes overconfident are stopped, and go on from what they have saved."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from dllm_rl.cli.main import main
from dllm_rl.config.load import validate
from dllm_rl.config.schema import DriftSection
from dllm_rl.driver.drift import DriftGuard
from dllm_rl.errors import Drifted
from dllm_rl.protocols.task import Task
from dllm_rl.reports.run_folder import comparable
from dllm_rl.seeding import python_random
from dllm_rl.train import train
from dllm_rl.types import Example


def seen(guard, *figures, after=0):
    """The verdict after each of some steps of (tokens per forward, confidence, reward)."""
    verdicts = []
    for step, one in enumerate(figures, after + 1):
        guard.observe(step, dict(zip(("tokens_per_forward", "confidence", "reward"), one, strict=True)))
        verdicts.append(guard.verdict is not None)
    return verdicts


def test_faster_without_a_better_reward_is_too_fast():
    first, fast, better = (2.0, 0.8, 0.5), (3.1, 0.8, 0.5), (3.1, 0.8, 0.51)
    guard = DriftGuard(DriftSection(tokens_per_forward=1.5, window=1))
    assert seen(guard, first, (3.0, 0.9, 0.1), better, fast) == [False, False, False, True]
    moved = "tokens_per_forward from 2 to 3.1 and reward from 0.5 to 0.5"
    assert guard.verdict == f"{moved}, beyond drift.tokens_per_forward = 1.5"
    whatever = DriftGuard(DriftSection(tokens_per_forward=1.5, window=1, reward_gain=None))
    assert seen(whatever, first, better) == [False, True]
    tolerant = DriftGuard(DriftSection(tokens_per_forward=1.5, window=1, reward_gain=-0.2))
    assert seen(tolerant, first, fast, (3.1, 0.8, 0.31), (3.1, 0.8, 0.29)) == [False, False, False, True]


def test_surer_without_a_better_reward_is_too_sure():
    guard = DriftGuard(DriftSection(confidence=0.1, window=1))
    assert seen(guard, (2.0, 0.8, 0.5), (9.0, 0.89, 0.1), (2.0, 0.91, 0.5)) == [False, False, True]
    assert guard.verdict == "confidence from 0.8 to 0.91 and reward from 0.5 to 0.5, beyond drift.confidence = 0.1"
    assert seen(DriftGuard(DriftSection(window=1)), (1.0, 0.1, 1.0), (9.0, 1.0, 0.0)) == [False, False], "no limits"


def test_means_over_the_first_and_the_last_steps_are_compared():
    def fast(tokens):
        return (tokens, 0.8, 0.5)

    guard = DriftGuard(DriftSection(tokens_per_forward=1.5, window=2))
    # First steps: 1 and 3, mean 2. One fast step of two has a mean of 3, which is allowed; the next has 3.1.
    assert seen(guard, fast(1.0), fast(3.0), fast(1.0), fast(5.0), fast(1.2)) == [False, False, False, False, True]


def test_a_step_without_a_reward_says_nothing_and_a_run_that_goes_back_forgets():
    guard = DriftGuard(DriftSection(tokens_per_forward=1.5, window=1))
    guard.observe(1, {"tokens_per_forward": 9.0, "confidence": 0.5})
    assert seen(guard, (2.0, 0.8, 0.5), (4.0, 0.8, 0.5), after=1) == [False, True]
    assert seen(guard, (2.0, 0.8, 0.5), after=2) == [False], "step 3 again, of a run that was set back"


def test_a_resumed_run_compares_with_the_same_first_steps(tmp_path):
    limits = DriftSection(tokens_per_forward=1.5, window=2)
    figures = [(n, 0.8, 0.5) for n in (1.0, 1.0, 1.2, 1.4, 1.6, 1.8)]
    whole, first, resumed = DriftGuard(limits), DriftGuard(limits), DriftGuard(limits)
    want = seen(whole, *figures)
    assert want == [False] * 4 + [False, True]
    seen(first, *figures[:3])
    first.save(tmp_path)
    resumed.load(tmp_path)
    assert seen(resumed, *figures[3:], after=3) == want[3:] and resumed.verdict == whole.verdict
    wider = DriftGuard(DriftSection(tokens_per_forward=1.5, window=3))
    wider.load(tmp_path)
    assert seen(wider, *figures[3:], after=3) == [False, False, True], "its first steps stay 1, 2 and 3"
    (tmp_path / "drift.json").unlink()
    wider.load(tmp_path)
    assert seen(wider, (9.0, 0.8, 0.5), after=6) == [False]


def configuration(folder, **drift):
    return {
        "run": {"name": "run", "steps": 4, "output": str(folder), "threads": 1},
        "model": {"family": "tiny", "init": {"hidden_size": 32, "num_layers": 1, "max_length": 64}},
        "data": {
            "task": {"name": "sudoku4", "train_puzzles": 40, "test_puzzles": 20, "min_holes": 4, "max_holes": 6},
            "prompts_per_step": 2,
            "samples_per_prompt": 2,
        },
        "sampling": {"max_new_tokens": 16, "tokens_per_step": 4},
        "algorithm": {"name": "trace_rl"},
        "rewards": [{"name": "sudoku", "mode": "cells"}],
        "evaluate": {"at_start": False, "at_end": False},
        "drift": drift,
    }


def test_a_run_beyond_a_limit_saves_and_ends_with_an_exit_code_of_its_own(tmp_path, capsys):
    values = configuration(tmp_path, tokens_per_forward=0.9, window=1, reward_gain=None)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    command = ["train", str(tmp_path / "run.yaml"), "--quiet"]
    assert main(command) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: step 2 is saved, and the run stops: tokens_per_forward from")
    assert (tmp_path / "run" / "checkpoints" / "step-000002").is_dir() and (tmp_path / "run" / "plot.png").is_file()
    assert main([*command, "--resume"]) == 3, "nothing has changed"
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2
    assert main([*command, "--resume", "drift.tokens_per_forward=1.1"]) == 0
    first, _ = json.loads((tmp_path / "run" / "checkpoints" / "step-000004" / "drift.json").read_text())
    assert list(first) == ["1"]


def test_limits_without_rollouts_are_refused(tmp_path):
    values = configuration(tmp_path, confidence=0.1) | {"algorithm": {"name": "masked_sft"}}
    with pytest.raises(ValueError, match=r"drift compares rollouts, and algorithm 'masked_sft' trains"):
        train(validate(values))


class Parity(Task):
    """The parity of every prefix of six bits: easy after the bit before, hard to say all at once."""

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config:
        """No options."""

    rewards = ("light_rewards:equal",)
    success = "light_rewards:equal"
    characters = "01="

    def examples(self, split):
        draw, found = python_random(0, "parity", split), []
        for number in range(4096 if split == "train" else 64):
            bits = [draw.randrange(2) for _ in range(6)]
            answer = "".join(str(sum(bits[: place + 1]) % 2) for place in range(6))
            prompt = "".join(map(str, bits)) + "="
            uid = f"{split}-{number}"
            found.append(Example(uid=uid, prompt=prompt, answer=answer, task="parity", completion=answer))
        return found

    def self_test(self, example):
        return example.answer, ""


@pytest.mark.slow
def test_speed_as_a_reward_makes_a_model_overconfident_unless_it_is_capped_or_stopped(tmp_path, monkeypatch):
    """The failure of parallel decoding inside RL (d1, issue 25): more and more tokens at once, and worse ones."""
    for folder in Path(__file__).parents[:2]:
        monkeypatch.syspath_prepend(str(folder))

    def values(name, steps, strategy=(), **sections):
        made = {
            "run": {"name": name, "seed": 1, "steps": steps, "output": str(tmp_path), "threads": 1},
            "model": {"family": "tiny", "init": {"hidden_size": 48, "num_layers": 2, "max_length": 32}},
            "data": {"task": {"name": "test_drift:Parity"}, "prompts_per_step": 64},
            "sampling": {
                "max_new_tokens": 6,
                "strategy": {"name": "confidence_threshold", "threshold": 0.9} | dict(strategy),
            },
            "algorithm": {"name": "masked_sft"},
            "learner": {"lr": 3e-3, "schedule": "constant", "warmup_steps": 10},
            "diagnostics": {"every_steps": None},
            "evaluate": {"at_start": False, "at_end": False},
        }
        return validate(made | sections)

    # It solves the task at more than 3 tokens per forward; the cap is below that.
    start = train(values("sft", 300)).folder / "checkpoints" / "step-000300" / "model"
    reinforced = {
        "model": {"path": str(start), "family": "tiny"},
        "data": {"task": {"name": "test_drift:Parity"}, "prompts_per_step": 16, "samples_per_prompt": 8},
        "algorithm": {"name": "lightning_rl"},
        "learner": {"lr": 2e-3, "schedule": "constant", "warmup_steps": 5},
    }

    def figures(name):
        rows = comparable(tmp_path / name)
        return [[row[figure] for row in rows] for figure in ("tokens_per_forward", "reward")]

    def mean(seen):
        return sum(seen) / len(seen)

    train(values("free", 16, **reinforced))
    train(values("capped", 16, {"max_tokens_per_step": 2}, **reinforced))
    with pytest.raises(Drifted, match=r"tokens_per_forward from .*, beyond drift.tokens_per_forward = 1.15"):
        train(values("guarded", 16, **reinforced, drift={"tokens_per_forward": 1.15, "window": 3}))
    (fast, wrong), (steady, right), (_, stopped) = (figures(name) for name in ("free", "capped", "guarded"))
    assert wrong[0] > 0.9 and mean(wrong[-8:]) < 0.6, wrong
    assert mean(fast[-8:]) > 1.15 * mean(fast[:3]), fast
    assert max(steady) <= 2 and mean(right[-8:]) > mean(wrong[-8:]) + 0.2, (steady, right, wrong)
    assert len(stopped) <= 13 and stopped == wrong[: len(stopped)], (stopped, wrong)
