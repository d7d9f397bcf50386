"""What every rollouter must keep to; see dllm_rl.protocols.rollouter."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from dllm_rl.config.plugins import build
from dllm_rl.conformance import cases, engines
from dllm_rl.conformance.rewards import example_columns
from dllm_rl.conformance.violation import require
from dllm_rl.errors import UserError
from dllm_rl.protocols.rollouter import Rollouter, Turn, check_turns
from dllm_rl.types import Prompt, Trajectory

SAMPLES = 2


class _Decoder:
    """The reference engine over a tiny model; remembers what it has decoded."""

    def __init__(self) -> None:
        model = cases.denoiser("tiny")
        self.tokenizer, self.sampling = cases.tokenizer(), engines.SAMPLED
        self.max_prompt_tokens = model.max_length - self.sampling.max_new_tokens
        self.decoded: list[Trajectory] = []
        self._engine = engines.oracle(model)

    def generate(self, prompts: Sequence[Prompt], *, samples_per_prompt: int = 1) -> list[Trajectory]:
        found = self._engine.generate(prompts, self.sampling, seed=0, samples_per_prompt=samples_per_prompt)
        self.decoded += found
        return found


class Subject:
    """A rollouter, and what it makes of prompts that have the columns of the tasks here."""

    def __init__(self, name: str, options: Mapping[str, Any]) -> None:
        columns = example_columns("")
        answer = str(columns.pop("answer"))
        text = cases.tokenizer().decode
        self.prompts = [
            dataclasses.replace(p, text=text(p.token_ids), answer=answer, columns=columns, injected={})
            for p in engines.PROMPTS
        ]
        self.decoders = [_Decoder(), _Decoder()]
        self.rollouters: list[Rollouter] = [build("rollouters", name, options) for _ in self.decoders]

    def turns(self, number: int = 0) -> list[Turn]:
        """Of the first rollouter, or of one that was made anew."""
        rollouter, decoder = self.rollouters[number], self.decoders[number]
        return rollouter.roll_out(self.prompts, decoder, samples_per_prompt=SAMPLES)


def episodes_are_whole(subject: Subject) -> None:
    """Every prompt has samples_per_prompt episodes, whose turns count from 0 in one group, with a trajectory each."""
    rollouter = subject.rollouters[0]
    require(rollouter.rewarded in ("episode", "turn"), f"rewarded = {rollouter.rewarded!r}")
    try:
        check_turns(subject.turns(), subject.prompts, samples_per_prompt=SAMPLES, multi_turn=rollouter.multi_turn)
    except UserError as error:
        require(False, str(error))


def turns_are_what_was_decoded(subject: Subject) -> None:
    """Each turn has a trajectory that generate() returned, and no two turns have the same one."""
    turns = subject.turns()
    known = {id(t) for t in subject.decoders[0].decoded}
    used = [id(turn.trajectory) for turn in turns]
    require(set(used) <= known, "a turn's trajectory does not come from generate()")
    require(len(set(used)) == len(used), "two turns have one trajectory")


def samples_do_not_share_randomness(subject: Subject) -> None:
    """No two turns have the same prompt uid and sample number, by which randomness is keyed (Turn.followed_by)."""
    seen = [(t.trajectory.prompt_uid, t.trajectory.sample) for t in subject.turns()]
    twice = next((one for one in seen if seen.count(one) > 1), None)
    require(twice is None, f"(uid, sample) {twice} occurs {seen.count(twice) if twice else 0} times")


def it_goes_on_where_it_was(subject: Subject) -> None:
    """Made anew, as after a resume, it makes the same episodes of the same prompts."""
    for first, again in zip(subject.turns(), subject.turns(1), strict=True):
        same = (first.prompt, first.group, first.episode, first.turn, first.reward)
        other = (again.prompt, again.group, again.episode, again.turn, again.reward)
        require(same == other, f"episode {first.episode}, turn {first.turn}: {same} and then {other}")
