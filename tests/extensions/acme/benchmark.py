"""A benchmark: a task whose test split and rewards are for evaluation."""

from __future__ import annotations

from acme.task import Echo
from dllm_rl.types import Example


class EchoBackwards(Echo):
    """Write the digits in the opposite order; held out as a whole but for what the reward self-test looks at."""

    def examples(self, split):
        numbers = range(90, 98) if split == "test" else [98]
        return [Example(uid=f"back-{n}", prompt=f"{n}=", answer=str(n)[::-1], task="echo_backwards") for n in numbers]
