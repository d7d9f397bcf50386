"""Held-out figures: what counts, what is left out, and that chunks do not matter."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from dllm_rl.config.schema import RewardPlugin
from dllm_rl.evaluation.evaluate import evaluate
from dllm_rl.evaluation.intervals import wilson
from dllm_rl.models.tokenizers import character_tokenizer
from dllm_rl.reward_pool.pool import RewardPool
from dllm_rl.types import Prompt, Sampling, Trajectory, WeightsVersion

TOKENIZER = character_tokenizer("0123456789")


class Recital:
    """An engine whose completions are known: each prompt's uid, digit by digit, in two forwards."""

    weights = WeightsVersion(step=0, digest="")

    def __init__(self):
        self.calls = []

    def generate(self, prompts, sampling, *, seed, samples_per_prompt=1, partial=None, max_blocks=None):
        self.calls.append((len(prompts), sampling.temperature, seed))
        return [self._recite(prompt) for prompt in prompts]

    def _recite(self, prompt):
        said = TOKENIZER.encode(prompt.uid, add_special_tokens=False)
        start, length = len(prompt.token_ids), len(said)
        step = torch.tensor([-1] * start + [i % 2 for i in range(length)])
        positions = (step >= 0).nonzero().flatten()
        tokens = torch.tensor([*prompt.token_ids, *said])
        return Trajectory(
            prompt_uid=prompt.uid,
            sample=0,
            tokens=tokens,
            prompt_length=start,
            completion_length=length,
            events=torch.stack([step[positions], positions, tokens[positions]], 1),
            unmask_step=step,
            behaviour_logp=torch.zeros(start + length),
            num_forwards=2,
            finish="length",
            exact=True,
            weights=self.weights,
            weights_step=step.clamp(max=0),
        )


def even(prompts, completions, **columns):
    """1 for an even number; a number that ends in 9 makes the verifier fail, one that ends in 7 has no value."""
    if any(text.endswith("9") for text in completions):
        raise ArithmeticError("nine")
    return [None if text.endswith("7") else float(int(text) % 2 == 0) for text in completions]


@pytest.fixture
def pool(monkeypatch, request):
    monkeypatch.syspath_prepend(str(request.path.parent))
    specs = [RewardPlugin(name="test_evaluate:even"), RewardPlugin(name="length", max_tokens=6, margin=2)]
    with RewardPool(specs, success="test_evaluate:even") as made:
        yield made


def prompts(*uids):
    return [Prompt(uid=uid, token_ids=(3, 4), text="", answer="", task="t") for uid in uids]


def run(engine, pool, rows, **more):
    settings = Sampling(max_new_tokens=8, temperature=0.0, tokens_per_step=2)
    return evaluate(engine.generate, pool, rows, TOKENIZER, settings, seed=5, **more)


def test_figures(pool):
    engine, seen = Recital(), []
    uids = ["1000", "1001", "1002", "1009", "1004", "100005"]
    result = run(engine, pool, prompts(*uids), chunk=4, advance=lambda done, note: seen.append(done))
    assert result.solved == (1, 0, 1, None, 1, 0)
    assert (result.scored, result.failed) == (5, 1)
    assert result.success == 3 / 5 and (result.low, result.high) == wilson(3, 5)
    assert result.components["test_evaluate:even"] == 3 / 5
    assert result.tokens_per_forward == (5 * 4 + 6) / (6 * 2)
    assert engine.calls == [(4, 0.0, 5), (2, 0.0, 5)] and seen == [4, 2]
    assert result.metrics()["eval/2_per_step/success"] == 0.6 and "solved" not in result.summary()
    whole = run(Recital(), pool, prompts(*uids), chunk=100)
    assert dataclasses.replace(whole, seconds=0) == dataclasses.replace(result, seconds=0)


def test_nothing_to_say(pool):
    with pytest.raises(ValueError, match="at least one held-out example"):
        run(Recital(), pool, [])
    with pytest.raises(ValueError, match=r"no completion could be scored; last failure: .*nine"):
        run(Recital(), pool, prompts("9", "19"))
