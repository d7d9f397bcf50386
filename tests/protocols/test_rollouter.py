"""Turns: how they follow one another, and which a rollouter may not return."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dllm_rl.errors import UserError
from dllm_rl.models.tokenizers import character_tokenizer
from dllm_rl.protocols.rollouter import Turn, check_turns
from dllm_rl.types import GIVEN, Prompt, Trajectory, WeightsVersion

PROMPTS = [Prompt(uid=f"p{n}", token_ids=(5, 6 + n), text="56", answer="", task="t", injected={0: 3}) for n in range(2)]
END = 2


class Digits:
    def encode(self, text, **_):
        return [int(character) for character in text]

    def decode(self, tokens, **_):
        return "".join(map(str, tokens))


def turn(prompt, group, episode, number=0, sample=0) -> Turn:
    start = len(prompt.token_ids)
    step = torch.tensor([GIVEN] * start + [0, 1, 2, 2])
    trajectory = Trajectory(
        prompt_uid=prompt.uid,
        sample=sample,
        tokens=torch.tensor([*prompt.token_ids, 8, END, END, END]),
        prompt_length=start,
        completion_length=2,
        events=torch.empty(0, 3, dtype=torch.int64),
        unmask_step=step,
        behaviour_logp=torch.zeros(start + 4),
        num_forwards=2,
        finish="eos",
        exact=True,
        weights=WeightsVersion(step=0, digest=""),
        weights_step=step,
    )
    return Turn(trajectory=trajectory, prompt=prompt, group=group, episode=episode, turn=number)


TURNS = [turn(PROMPTS[row // 2], row // 2, row, sample=row % 2) for row in range(4)]
SECOND = turn(TURNS[0].followed_by("43", Digits()), 0, 0, 1)
RULES = {"samples_per_prompt": 2, "multi_turn": True}


def test_the_next_prompt_is_what_was_said_and_the_reply():
    prompt = SECOND.prompt
    assert prompt.token_ids == (5, 6, 8, END, 4, 3), "the canvas after the first EOS was not said"
    assert prompt.text == "56" + "82" + "43" and not prompt.injected
    third = turn(prompt, 0, 0, 2).followed_by("1", Digits())
    uids = {t.followed_by("1", Digits()).uid for t in [*TURNS, SECOND]} | {p.uid for p in PROMPTS}
    assert len(uids | {third.uid}) == 4 + 1 + 2, "two completions would share their randomness"


def test_special_tokens_in_a_reply_stay_text_and_the_templates_are_special():
    tokenizer = character_tokenizer("abc<>|eos")
    end = tokenizer.eos_token
    said = TURNS[0].followed_by(f"a{end}b", tokenizer, before=end, after=end + "c")
    start = len(TURNS[0].prompt.token_ids) + 2
    eos, written = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(list(f"a{end}b"))
    assert list(said.token_ids[start:]) == [eos, *written, eos, tokenizer.convert_tokens_to_ids("c")]
    assert eos not in written and said.text.endswith(f"{end}a{end}b{end}c")


def test_one_and_several_turns_pass():
    check_turns(TURNS, PROMPTS, samples_per_prompt=2, multi_turn=False)
    check_turns([TURNS[0], SECOND, *TURNS[1:]], PROMPTS, **RULES)


@pytest.mark.parametrize(
    "turns",
    [
        [TURNS[0], replace(SECOND, group=1), *TURNS[1:]],
        [replace(TURNS[0], turn=1), *TURNS[1:]],
        [SECOND, *TURNS],
        [replace(TURNS[0], prompt=PROMPTS[1]), *TURNS[1:]],
        TURNS[1:],
        [replace(t, group=t.group + 1) for t in TURNS],
    ],
    ids=["two groups", "no first turn", "out of order", "another prompt", "an episode too few", "no such group"],
)
def test_other_turns_are_refused(turns):
    with pytest.raises(UserError, match="the rollouter's"):
        check_turns(turns, PROMPTS, **RULES)


@pytest.mark.parametrize("turns", [[TURNS[0], SECOND, *TURNS[1:]], [replace(TURNS[0], reward=1.0), *TURNS[1:]]])
def test_who_says_one_turn_has_one_and_no_reward(turns):
    with pytest.raises(UserError, match="needs multi_turn = True"):
        check_turns(turns, PROMPTS, samples_per_prompt=2, multi_turn=False)
