"""Presets decode, token for token, what the released generators of LLaDA, Dream, SDAR and Fast-dLLM decode.

tests/rollouts/golden/published.json holds their tokens on tiny random checkpoints; scripts/parity/published.py wrote it
and names the released files and commits. The random numbers are the same on both sides.
"""

from __future__ import annotations

import json
import sys
from functools import cache
from pathlib import Path

import pytest

from dllm_rl.config.plugins import build
from dllm_rl.config.schema import SamplingSection
from dllm_rl.types import Prompt, Sampling, WeightsVersion
from rollouts.native import NativeSampler
from rollouts.reference import ReferenceSampler

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts" / "parity"))

from cases import CANVAS, LENGTHS, SEED, cases, prompt
from checkpoints import denoiser

GOLDEN = json.loads((Path(__file__).parent / "golden" / "published.json").read_text(encoding="utf-8"))["cases"]
FAMILY = {"llada": "llada", "fast_dllm": "llada", "dream": "dream", "sdar": "sdar"}


@cache
def model(family):
    made = denoiser(family)
    # Released generators go on behind an EOS; the mask token is never generated, so that nothing ends a row here.
    made.eos_id, made.end_ids = made.mask_id, (made.mask_id,)
    return made


def decode(preset, settings, engine=NativeSampler):
    """Tokens of both prompts of a case, with the options that are given beside its preset."""
    section = SamplingSection.model_validate(
        {"preset": preset, "block_size": None, "max_new_tokens": CANVAS} | settings
    )
    sampling = Sampling(**section.model_dump(exclude={"preset", "strategy"}))
    strategy = build("strategies", section.strategy.name, section.strategy.options)
    prompts = [
        Prompt(uid=f"p{row}", token_ids=tuple(prompt(row, length)), text="", answer="", task="t")
        for row, length in enumerate(LENGTHS[preset])
    ]
    decoder = engine(model(FAMILY[preset]), strategy, weights=WeightsVersion(step=0, digest=""))
    rows = decoder.generate(prompts, sampling, seed=SEED)
    return [t.tokens[t.prompt_length :].tolist() for t in rows]


def assert_equal(got, want):
    for ours, released in zip(got, want, strict=True):
        assert len(released) >= CANVAS - 2 and ours[: len(released)] == released


def test_the_file_holds_every_case_as_it_is_written_now():
    assert {name: (row["preset"], row["sampling"]) for name, row in GOLDEN.items()} == {
        name: (preset, ours) for name, preset, _, ours in cases()
    }


@pytest.mark.parametrize("name", GOLDEN)
def test_native_decodes_the_released_tokens(name):
    case = GOLDEN[name]
    assert_equal(decode(case["preset"], case["sampling"]), case["tokens"])


@pytest.mark.parametrize("name", list(GOLDEN)[::7])
def test_the_reference_engine_decodes_them_too(name):
    case = GOLDEN[name]
    assert_equal(decode(case["preset"], case["sampling"], ReferenceSampler), case["tokens"])
