"""Every algorithm learns a toy: say the prompt's digit four times."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from dllm_rl import registry
from dllm_rl.config.schema import Config
from dllm_rl.protocols.task import Task
from dllm_rl.train import train
from dllm_rl.types import Example
from tests.methods import paces_itself, sections, tiny

BAR = 0.8  # mean share of right characters on greedy completions; a random model has about 0.1
FAST = 3.5  # tokens per forward, of at most 4
LR = 3e-3
GENTLE = ("gdpo", "spg", "unigrpo")  # at LR they settle for some of the digits, with most seeds
SFT_STEPS = 25  # after which the task is solved, slowly


class Echo(Task):
    """Digits 1..6, in training and in evaluation: whether it learns, not whether it generalises."""

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config:
        """No options."""

    rewards = ("light_rewards:share",)
    success = "light_rewards:share"
    characters = "123456="

    def examples(self, split):
        return [self._example(split, d, d * 4) for d in "123456"]

    def _example(self, split, digit, answer):
        return Example(
            uid=f"{split}-{digit}",
            prompt=f"{digit}=",
            answer=answer,
            task="echo",
            completion=answer,
            chosen=answer,
            rejected=str(int(digit) % 6 + 1) * 4,
            trace=answer,
        )

    def self_test(self, example):
        return example.answer, ""


@pytest.mark.parametrize("name", sorted(registry.names("algorithms")))
def test_learns(name, tmp_path, monkeypatch):
    for folder in Path(__file__).parents[:2]:
        monkeypatch.syspath_prepend(str(folder))
    method, rates = sections(name, threshold=0.7), tiny(name).learner
    method["sampling"]["tokens_per_step"] = min(2, method["sampling"]["tokens_per_step"])  # of 4
    config = {
        "run": {"name": "run", "steps": 200, "output": str(tmp_path), "threads": 1},
        "model": {"family": "tiny", "init": {"hidden_size": 32, "num_layers": 1, "num_heads": 4, "max_length": 16}},
        "data": {"task": {"name": "test_learns:Echo"}, "prompts_per_step": 6, "samples_per_prompt": 8},
        "sampling": {"max_new_tokens": 4} | method["sampling"],
        "algorithm": method["algorithm"],
        "learner": {"lr": LR, "value_lr": LR * rates.value_lr / rates.lr, "schedule": "constant"},
        "evaluate": {"at_start": True},
    }
    if name in GENTLE:
        config["learner"] |= {"lr": LR / 3}
    fast = paces_itself(name)
    if tiny(name).model.teacher is not None:  # it starts from nothing, and its teacher solves the task
        start = {
            "run": {"name": "sft", "steps": SFT_STEPS, "output": str(tmp_path)},
            "algorithm": {"name": "masked_sft"},
        }
        folder = train(Config.model_validate(config | start)).folder
        config["model"] |= {"teacher": {"path": str(next(folder.glob("checkpoints/*/model")))}}
    if fast:  # it speeds up a model that solves the task: tokens per forward where the answers are right
        start = {
            "run": {"name": "sft", "steps": SFT_STEPS, "output": str(tmp_path)},
            "algorithm": {"name": "masked_sft"},
            "sampling": {"max_new_tokens": 4},  # an untrained policy is refused
        }
        folder = train(Config.model_validate(config | start)).folder
        config["learner"] |= {"lr": LR / 3}  # gently, or it forgets
        config["model"] = {"path": str(next(folder.glob("checkpoints/*/model")))}
    summary = train(Config.model_validate(config))
    before, after = summary.before[0], summary.after[0]
    assert after.components["light_rewards:share"] > BAR, (before, after)
    if fast:
        assert before.tokens_per_forward < 2 and after.tokens_per_forward > FAST, (before, after)
    else:
        assert before.components["light_rewards:share"] < 0.4, before
