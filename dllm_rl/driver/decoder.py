"""Decodes the turns of one batch: where randomness, pauses and the turns of the engines' users come together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

from dllm_rl import seeding
from dllm_rl.config.schema import Config
from dllm_rl.driver.build import Run
from dllm_rl.reports.clock import Clock
from dllm_rl.types import Prompt, Trajectory


@dataclass(slots=True)
class PartialBatch:
    """How far a batch is decoded.

    Attributes:
        trajectories: of all calls so far, one call after the other; those of the last one may be paused.
        blocks: of its completions that the last call has decoded; 0 = it was not to pause.
        seconds: time of the parts so far.
    """

    trajectories: list[Trajectory] = field(default_factory=list)
    blocks: int = 0
    seconds: dict[str, float] = field(default_factory=dict)


class BatchDecoder:
    """A protocols.Decoder for one batch."""

    def __init__(
        self,
        run: Run,
        config: Config,
        step: int,
        partial: PartialBatch,
        engines: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """Decode nothing yet.

        Args:
            run: its parts.
            config: of the run.
            step: the batch's.
            partial: what a former decoder of the batch has decoded; grows with what this one does.
            engines: held while engines decode; others have them between two calls, and between two pauses.
        """
        self.tokenizer, self.sampling, self.step = run.tokenizer, run.sampling, step
        self.max_prompt_tokens = run.denoiser.max_length - run.sampling.max_new_tokens
        self._pool, self._engines, self._partial = run.engines, engines, partial
        self._key, self._pause = seeding.derive(config.run.seed, "rollout", step), config.rollout.pause_blocks
        self._timer, self._taken = Clock(partial.seconds), 0

    def generate(self, prompts: Sequence[Prompt], *, samples_per_prompt: int = 1) -> list[Trajectory]:
        """Decode, or repeat what a former decoder of the batch has decoded; see Decoder."""
        partial, begin = self._partial, self._taken
        self._taken += len(prompts) * samples_per_prompt
        found: list[Trajectory] | None = partial.trajectories[begin : self._taken]
        known = [(t.prompt_uid, t.tokens[: t.prompt_length].tolist()) for t in found or ()]
        # After a resume, a tool may have answered otherwise than before: completions of other prompts are of no use.
        if known != [(p.uid, list(p.token_ids)) for p in prompts for _ in range(samples_per_prompt)]:
            del partial.trajectories[begin:]
            found, partial.blocks = None, 0
        while found is None or any(t.finish == "paused" for t in found):
            with self._engines(), self._timer("rollout_s"):
                blocks = None if self._pause is None else partial.blocks + self._pause
                found = self._pool.generate(
                    prompts,
                    self.sampling,
                    seed=self._key,
                    samples_per_prompt=samples_per_prompt,
                    partial=found,
                    max_blocks=blocks,
                )
                partial.trajectories[begin:], partial.blocks = found, blocks or 0
        return found
