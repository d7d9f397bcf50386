"""What reward functions see of a completion, and what the record keeps."""

from __future__ import annotations

import pytest
import torch

from dllm_rl.driver.build import build_run
from dllm_rl.driver.collect import roll_out
from dllm_rl.reports.clock import Clock
from dllm_rl.reports.progress import Quiet

REWARD = """
def clean(prompts, completions, **columns):
    return [float("<" not in text and "1" not in text) for text in completions]
"""


@pytest.fixture
def collected(tiny, tmp_path, monkeypatch):
    """collected(*overrides) -> (what a step of a random model gives, its run)."""
    (tmp_path / "text_rewards.py").write_text(REWARD)
    monkeypatch.syspath_prepend(str(tmp_path))

    def make(*overrides):
        local = ("cluster.kind=local", "cluster.engines=1", "reward_pool.self_test=0")
        config = tiny(*local, "rewards=[{name: 'text_rewards:clean'}]", *overrides)
        with build_run(config, tmp_path / "model", Quiet()) as run, run.reward_pool:
            run.weights.verify()
            return roll_out(run, config, run.source.batch(0), 0, Clock()), run

    return make


def test_rewards_see_no_special_token_and_the_record_keeps_them(collected):
    found, _ = collected()
    said = [sample["completion"] for sample in found.samples]
    assert any("<pad>" in text for text in said), "the test needs special tokens"
    assert [sample["reward"] for sample in found.samples] == [float("1" not in text) for text in said]


def test_completions_end_at_the_end_tokens_of_the_configuration(collected):
    found, run = collected("model.end_tokens=['1']")
    one = run.tokenizer.convert_tokens_to_ids("1")
    assert run.denoiser.end_ids == (run.tokenizer.eos_token_id, one)
    said = [sample["completion"] for sample in found.samples]
    assert not any("1" in text for text in said) and found.rewards.total.tolist() == [1.0] * len(said)
    ended = found.batch.tokens[found.batch.completion]
    assert (ended == one).sum() > 2  # scored, as every end token is


def test_what_never_ended_is_scored_as_empty_if_the_configuration_says_so(collected):
    found, run = collected("reward_pool.truncated=blank")
    whole, _ = collected()
    ends = torch.isin(found.batch.tokens, torch.tensor(run.denoiser.end_ids)) & found.batch.completion
    cut = ~ends.any(-1)
    assert torch.equal(found.batch.tokens, whole.batch.tokens) and (whole.rewards.total[cut] == 0).any()
    assert (found.rewards.total[cut] == 1).all(), "an empty text has no 1 in it"
    assert torch.equal(found.rewards.total[~cut], whole.rewards.total[~cut])
