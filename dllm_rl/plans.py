"""What an algorithm is told before a run, and what it may ask for during one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dllm_rl.types import Example, Prompt, Sampling


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What an algorithm may look at before anything starts, to refuse what cannot work.

    Attributes:
        sampling: decoding while training.
        strategy: name of the unmasking strategy while training.
        has_policy: whether that strategy has a network to train.
        examples: the training rows.
        task: name of the task.
    """

    sampling: Sampling
    strategy: str
    has_policy: bool
    examples: Sequence[Example]
    task: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Further:
    """A rollout that an algorithm asks for in view of the ordinary ones.

    Attributes:
        group: number of the group that it joins.
        prompt: decoded once, perhaps with injected tokens.
        strategy: name and options of another unmasking strategy: the row is then an expert's (RolloutBatch.expert);
            None = the one of the run.
        block_size: decoding block of an expert, tokens; None = the run's.
    """

    group: int
    prompt: Prompt
    strategy: Mapping[str, Any] | None = None
    block_size: int | None = None
