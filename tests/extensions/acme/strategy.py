"""An unmasking strategy."""

from __future__ import annotations

from dllm_rl.protocols.strategy import UnmaskingStrategy


class Rightmost(UnmaskingStrategy):
    """Commits the last hidden positions of the block first."""

    calls = 0  # of this process, for the test

    def select(self, candidates):
        Rightmost.calls += 1
        eligible = candidates.eligible
        from_the_right = eligible.flip(-1).cumsum(-1).flip(-1)
        return eligible & (from_the_right <= candidates.count[:, None])
