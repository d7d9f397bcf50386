"""One completion per sample."""

from __future__ import annotations

from collections.abc import Sequence

from dllm_rl.protocols.rollouter import Decoder, Rollouter, Turn
from dllm_rl.types import Prompt


class SingleTurn(Rollouter):
    """A sample is one completion of its prompt."""

    multi_turn = False

    def roll_out(self, prompts: Sequence[Prompt], decoder: Decoder, *, samples_per_prompt: int) -> list[Turn]:
        """One engine call."""
        found = decoder.generate(prompts, samples_per_prompt=samples_per_prompt)
        groups = [row // samples_per_prompt for row in range(len(found))]
        return [
            Turn(trajectory=trajectory, prompt=prompts[group], group=group, episode=row)
            for row, (trajectory, group) in enumerate(zip(found, groups, strict=True))
        ]
