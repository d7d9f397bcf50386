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

BAR = 0.8  # mean share of right characters on greedy completions; a random model has about 0.1
FAST = 3.5  # tokens per forward, of at most 4


class Echo(Task):
    """Digits 1..6, in training and in evaluation: whether it learns, not whether it generalises."""

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config:
        """No options."""

    rewards = ("test_learns:share",)
    success = "test_learns:share"
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


def share(prompts, completions, *, answer, **columns):
    """The share of characters that are right; 1 only if all are there and nothing else."""
    return [
        sum(a == b for a, b in zip(text, wanted, strict=False)) / max(len(text), len(wanted))
        for text, wanted in zip(completions, answer, strict=True)
    ]


SETTINGS = {
    "igpo": {"algorithm": {"reserve": 0, "chunk": [1, 2]}},
    "just_grpo": {"sampling": {"strategy": {"name": "left_to_right"}, "tokens_per_step": 1}},
    # It speeds up a model that solves the task; its reward is tokens per forward where the answers are right.
    "lightning_rl": {
        "sft_steps": 25,
        "lr": 1e-3,
        "sampling": {"strategy": {"name": "confidence_threshold", "threshold": 0.7}},
    },
    # Its reward is speed as well: when to commit how much, for a model that solves the task and stays as it is.
    "unmasking_policy": {
        "sft_steps": 60,
        "lr": 3e-3,
        "sampling": {"strategy": {"name": "learned", "width": 32}, "temperature": 0.0},
    },
}


@pytest.mark.parametrize("name", sorted(registry.names("algorithms")))
def test_learns(name, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    more = SETTINGS.get(name, {})
    config = {
        "run": {"name": "run", "steps": 150, "output": str(tmp_path), "threads": 1},
        "model": {"family": "tiny", "init": {"hidden_size": 32, "num_layers": 1, "num_heads": 4, "max_length": 16}},
        "data": {"task": {"name": "test_learns:Echo"}, "prompts_per_step": 6, "samples_per_prompt": 8},
        "sampling": {"max_new_tokens": 4, "tokens_per_step": 2} | more.get("sampling", {}),
        "algorithm": {"name": name} | more.get("algorithm", {}),
        "learner": {"lr": 3e-3, "schedule": "constant"},
        "evaluate": {"at_start": True},
    }
    if "sft_steps" in more:
        start = {
            "run": {"name": "sft", "steps": more["sft_steps"], "output": str(tmp_path)},
            "algorithm": {"name": "masked_sft"},
            "sampling": {"max_new_tokens": 4},  # an untrained policy is refused
        }
        folder = train(Config.model_validate(config | start)).folder
        config["learner"] = {"lr": more["lr"], "schedule": "constant"}
        config["model"] = {"path": str(next(folder.glob("checkpoints/*/model")))}
    summary = train(Config.model_validate(config))
    before, after = summary.before[0], summary.after[0]
    assert after.components["test_learns:share"] > BAR, (before, after)
    if "sft_steps" in more:
        assert before.tokens_per_forward < 2 and after.tokens_per_forward > FAST, (before, after)
    else:
        assert before.components["test_learns:share"] < 0.4, before
