"""Which positions each strategy commits, by hand; and a whole decode of a table model whose order is known."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import nn

from dllm_rl import registry
from dllm_rl.protocols.strategy import Candidates
from dllm_rl.types import Prompt, Sampling, WeightsVersion
from rollouts.native import NativeSampler
from rollouts.reference import ReferenceSampler

CANDIDATES = Candidates(
    eligible=torch.tensor([[True, True, True, True, False]]),
    token=torch.tensor([[1, 2, 3, 4, 5]]),
    logp=torch.tensor([[math.log(p) for p in (0.95, 0.5, 0.92, 0.6, 1.0)]]),
    entropy=torch.tensor([[0.4, 0.1, 0.3, 0.2, 0.0]]),
    margin=torch.tensor([[0.1, 0.2, 0.3, 0.4, 0.9]]),
    noise=torch.tensor([[0.2, 0.8, 0.1, 0.7, 0.99]], dtype=torch.float64),
    count=torch.tensor([2]),
    context=torch.tensor([[True] * 5]),
    masked=torch.tensor([[True, True, True, True, False]]),
    time=torch.tensor([0.25]),
)
FACTOR, BOUND = (
    f"rollouts.strategies.{place}" for place in ("confidence_factor:ConfidenceFactor", "entropy_bound:EntropyBound")
)


def make(name, **options):
    cls = registry.load("strategies", name)
    return cls(cls.Config(**options))


@pytest.mark.parametrize(
    ("name", "options", "want"),
    [
        ("low_confidence", {}, [0, 2]),
        ("random", {}, [1, 3]),
        ("entropy", {}, [1, 3]),
        ("margin", {}, [2, 3]),
        ("left_to_right", {}, [0, 1]),
        ("confidence_threshold", {"threshold": 0.9}, [0, 2]),
        ("confidence_threshold", {"threshold": 0.55}, [0, 2, 3]),
        ("confidence_threshold", {"threshold": 0.99}, [0]),
        ("confidence_threshold", {"threshold": 0.99, "at_least_count": True}, [0, 2]),
        ("confidence_threshold", {"threshold": 0.55, "at_least_count": True}, [0, 2, 3]),
        # Confidences 0.95, 0.92, 0.6, 0.5 against 1 - f / (n + 1): 0, 0.667, 0.75, 0.8 with f = 1
        (FACTOR, {"factor": 1.0}, [0, 2]),
        (FACTOR, {"factor": 0.1}, [0]),  # the second needs 0.967
        (FACTOR, {"factor": 1.7}, [0, 1, 2, 3]),  # the third needs 0.575; the last fails alone, and comes along
        (FACTOR, {"factor": 3.0}, [0, 1, 2, 3]),
        # Entropies 0.1, 0.2, 0.3, 0.4: sums without the largest are 0, 0.1, 0.3, 0.6
        (BOUND, {"bound": 0.0}, [1]),
        (BOUND, {"bound": 0.29}, [1, 3]),
        (BOUND, {"bound": 0.31}, [1, 2, 3]),
        (BOUND, {"bound": 0.61}, [0, 1, 2, 3]),
        # The cap: of what each of them would commit, the best.
        ("confidence_threshold", {"threshold": 0.55, "max_tokens_per_step": 2}, [0, 2]),
        ("confidence_threshold", {"threshold": 0.55, "max_tokens_per_step": 9}, [0, 2, 3]),
        ("confidence_threshold", {"threshold": 0.99, "at_least_count": True, "max_tokens_per_step": 1}, [0]),
        (FACTOR, {"factor": 3.0, "max_tokens_per_step": 3}, [0, 2, 3]),
        (BOUND, {"bound": 0.61, "max_tokens_per_step": 2}, [1, 3]),
        # Scores divided by a low temperature outweigh any noise; with a high one the highest noise wins.
        ("low_confidence", {"temperature": 1e-4}, [0, 2]),
        ("entropy", {"temperature": 1e-4}, [1, 3]),
        ("margin", {"temperature": 1e-4}, [2, 3]),
        ("low_confidence", {"temperature": 1e4}, [1, 3]),
        ("entropy", {"temperature": 1e4}, [1, 3]),
        ("margin", {"temperature": 1e4}, [1, 3]),
    ],
)
def test_choice_by_hand(name, options, want):
    assert make(name, **options).select(CANDIDATES)[0].nonzero().flatten().tolist() == want


@pytest.mark.parametrize("name", ["confidence_threshold", FACTOR, BOUND])
def test_a_cap_holds_for_every_row_and_leaves_none_behind(name):
    generator = torch.Generator().manual_seed(0)
    eligible = torch.rand(64, 12, generator=generator) < 0.5
    sure = dataclasses.replace(
        CANDIDATES,
        eligible=eligible,
        logp=torch.zeros(64, 12).masked_fill(~eligible, float("-inf")),
        entropy=torch.zeros(64, 12),
        count=eligible.sum(-1),
    )
    left = eligible.sum(-1)
    assert torch.equal(make(name).select(sure).sum(-1), left)
    assert torch.equal(make(name, max_tokens_per_step=3).select(sure).sum(-1), left.clamp(max=3))
    with pytest.raises(ValueError, match=r"max_tokens_per_step = 0: must be at least 1"):
        make(name, max_tokens_per_step=0)


@pytest.mark.parametrize("name", ["low_confidence", "entropy", "margin"])
def test_a_temperature_makes_choices_random_and_is_never_negative(name):
    assert make(name, temperature=0.1).samples and not make(name).samples
    with pytest.raises(ValueError, match=r"temperature = -1.0: must be >= 0"):
        make(name, temperature=-1.0)


@pytest.mark.parametrize("threshold", [0.0, 1.5, -1.0])
def test_threshold_out_of_range(threshold):
    with pytest.raises(ValueError, match="must be in"):
        make("confidence_threshold", threshold=threshold)


class Table(nn.Module):
    """Each position predicts one token with a fixed confidence, whatever the context."""

    mask_id, eos_id, pad_id, vocab_size, max_length = 0, 1, 1, 6, 32
    end_ids = (1,)
    block_size, block_origin, shift = None, "response", False
    confidence = (0.9, 0.6, 0.8, 0.7, 0.95, 0.5)
    token = (2, 3, 4, 5, 2, 3)

    @property
    def module(self):
        return self

    device = torch.device("cpu")

    def hidden_states(self, tokens, mask, valid, block_ids=None):
        logits = torch.zeros(*tokens.shape, self.vocab_size)
        for offset, (p, token) in enumerate(zip(self.confidence, self.token, strict=True)):
            logits[:, 2 + offset] = math.log((1 - p) / 4)  # four other clean tokens
            logits[:, 2 + offset, token] = math.log(p)
        return logits

    def unembed(self, rows):
        return rows


@pytest.mark.parametrize("engine", [ReferenceSampler, NativeSampler])
def test_a_table_model_is_decoded_in_the_order_of_its_confidences(engine):
    prompt = Prompt(uid="a", token_ids=(2, 3), text="", answer="", task="")
    weights = WeightsVersion(step=0, digest="")
    settings = Sampling(max_new_tokens=6, temperature=0.0, tokens_per_step=2)
    (whole,) = engine(Table(), make("low_confidence"), weights=weights).generate([prompt], settings, seed=0)
    assert whole.tokens.tolist() == [2, 3, 2, 3, 4, 5, 2, 3]
    assert whole.unmask_step.tolist() == [-1, -1, 0, 2, 1, 1, 0, 2]  # 0.95 and 0.9, then 0.8 and 0.7, then the rest
    torch.testing.assert_close(whole.behaviour_logp[2:], torch.tensor(Table.confidence).log())
    assert whole.num_forwards == 3 and whole.finish == "length" and whole.completion_length == 6
    blocks = Sampling(max_new_tokens=6, temperature=0.0, tokens_per_step=2, block_size=3)
    (split,) = engine(Table(), make("low_confidence"), weights=weights).generate([prompt], blocks, seed=0)
    assert split.unmask_step.tolist() == [-1, -1, 0, 1, 0, 2, 2, 3]
    assert split.events.tolist() == [[0, 2, 2], [0, 4, 4], [1, 3, 3], [2, 5, 5], [2, 6, 2], [3, 7, 3]]
