"""The contract of rollouters: what one sample of a prompt is.

An environment in the words of prime-rl and verifiers, an agent loop in verl's: it stands between the training loop and
the engines. With the built-in ``single_turn`` a sample is one completion. A sample of several turns is an episode:

    turn 0    prompt                              -> completion
    turn 1    prompt, completion, tool's answer   -> completion

Each turn is a row of the batch. What earlier turns and tools have said is prompt there: given, and never scored, since
only the row's own completion is.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

from dllm_rl.errors import UserError
from dllm_rl.types import Prompt, Sampling, Trajectory


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """A completion within an episode: one row of the batch.

    Attributes:
        trajectory: how it was decoded.
        prompt: what it completes; reward functions see its text, answer and columns.
        group: number of the batch's prompt that the episode began with.
        episode: number of the episode, another one for each of the batch.
        turn: number of the turn within the episode, from 0.
        reward: what the rollouter itself gives for this turn, added to the reward functions' total and logged as the
            component "environment"; None = nothing.
    """

    trajectory: Trajectory
    prompt: Prompt
    group: int
    episode: int
    turn: int = 0
    reward: float | None = None

    def followed_by(self, reply: str, tokenizer: Any, *, before: str = "", after: str = "") -> Prompt:
        """The prompt of the next turn: this turn's prompt and completion, then the reply of a tool or a user.

        Args:
            reply: what was replied; special tokens that are written in it stay text.
            tokenizer: of the model.
            before: what the chat template puts before a reply; its special tokens are special.
            after: what it puts behind the reply, up to where the model goes on.
        """
        t, prompt = self.trajectory, self.prompt
        said = t.tokens[t.prompt_length : t.prompt_length + t.completion_length].tolist()
        return dataclasses.replace(
            prompt,
            uid=f"{prompt.uid}#{t.sample}",  # randomness is keyed by it: the samples of a prompt must not share theirs
            token_ids=(
                *prompt.token_ids,
                *said,
                *tokenizer.encode(before, add_special_tokens=False),
                *tokenizer.encode(reply, add_special_tokens=False, split_special_tokens=True),
                *tokenizer.encode(after, add_special_tokens=False),
            ),
            text=prompt.text + tokenizer.decode(said, skip_special_tokens=False) + before + reply + after,
            injected={},
            messages=None,
        )


class Decoder(Protocol):
    """What a rollouter decodes with: the run's engines, with its sampling and its randomness.

    Attributes:
        tokenizer: of the model.
        sampling: how completions are decoded.
        max_prompt_tokens: longest prompt that leaves room for a completion; an episode must end before it.
    """

    tokenizer: Any
    sampling: Sampling
    max_prompt_tokens: int

    def generate(self, prompts: Sequence[Prompt], *, samples_per_prompt: int = 1) -> list[Trajectory]:
        """Decode every prompt samples_per_prompt times, prompt-major order. One call for all is faster than many.

        Engines are held during the call only: while a tool works, they may decode for others or get new weights.
        """


class Rollouter:
    """Decides what one sample of a prompt is, and makes it.

    It may be made anew in the middle of a batch, after a resume: the first calls of generate() then return what they
    returned before, as long as the prompts are the same. Randomness of its own must therefore come from the prompts.

    Attributes:
        multi_turn: whether episodes may have several turns, or turns rewards of their own; False promises that none do.
        rewarded: what reward functions score: "episode" the completion of the last turn, and all turns of the episode
            get its reward; "turn" each completion, for itself.
    """

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config:
        """Options of the rollouter."""

    multi_turn: ClassVar[bool] = True
    rewarded: ClassVar[Literal["episode", "turn"]] = "episode"

    def __init__(self, config: Any) -> None:
        self.config = config

    def roll_out(self, prompts: Sequence[Prompt], decoder: Decoder, *, samples_per_prompt: int) -> list[Turn]:
        """All turns of samples_per_prompt episodes for each prompt, the turns of an episode in their order.

        Args:
            prompts: of the batch; those of group g begin with prompts[g].
            decoder: decodes.
            samples_per_prompt: episodes of each prompt: the group.
        """
        raise NotImplementedError


def check_turns(turns: Sequence[Turn], prompts: Sequence[Prompt], *, samples_per_prompt: int, multi_turn: bool) -> None:
    """Hold what roll_out returned to its contract.

    Args:
        turns: what it returned.
        prompts: what it was given.
        samples_per_prompt: likewise.
        multi_turn: what the rollouter says.
    Raises:
        UserError: naming what is off.
    """
    seen: dict[int, list[Turn]] = {}
    for turn in turns:
        t, before = turn.trajectory, seen.setdefault(turn.episode, [])
        fits = t.tokens[: t.prompt_length].tolist() == list(turn.prompt.token_ids)
        fits &= turn.turn == len(before) and turn.group == (before or [turn])[0].group
        if not fits or (not multi_turn and (before or turn.reward is not None)):
            raise UserError(
                f"the rollouter's turn {turn.turn} of episode {turn.episode}, group {turn.group}: turns count from 0 "
                f"in one group, with their prompt's trajectory; a second one, or a reward, needs multi_turn = True"
            )
        before.append(turn)
    sizes = Counter(rows[0].group for rows in seen.values())
    if sizes != dict.fromkeys(range(len(prompts)), samples_per_prompt):
        raise UserError(
            f"the rollouter's groups have {dict(sizes)} episodes: must be {samples_per_prompt} "
            f"(data.samples_per_prompt) for each of the {len(prompts)} prompts"
        )
