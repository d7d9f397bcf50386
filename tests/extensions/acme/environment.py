"""An environment of two turns: the model may try again."""

from __future__ import annotations

from dllm_rl.protocols.rollouter import Rollouter, Turn


class TryAgain(Rollouter):
    """Every second sample is asked again, after "+"."""

    def roll_out(self, prompts, decoder, *, samples_per_prompt):
        turns = [
            Turn(trajectory=t, prompt=prompts[row // samples_per_prompt], group=row // samples_per_prompt, episode=row)
            for row, t in enumerate(decoder.generate(prompts, samples_per_prompt=samples_per_prompt))
        ]
        again = turns[::2]
        replied = [turn.followed_by("+", decoder.tokenizer) for turn in again]
        for turn, prompt, t in zip(again, replied, decoder.generate(replied), strict=True):
            turns.append(Turn(trajectory=t, prompt=prompt, group=turn.group, episode=turn.episode, turn=1))
        return turns
