"""How many masked positions each forward of a block commits."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from dllm_rl.seeding import uniform
from dllm_rl.types import GIVEN, Sampling

ARRIVAL_NOISE = 3  # role of the uniforms of a (row, position) that say when it is unmasked
TIME_END = 1e-3  # last point of Dream's time grid, `eps` in its released code


def commits(begun: int, block_size: int, sampling: Sampling) -> tuple[int, ...]:
    """Positions that the forwards of a block commit, one number a forward; the last one is repeated.

    S denoising steps (Sampling.steps_per_block) of a block that begins with n masked positions commit:

        static      tokens_per_step; with `steps`, block_size // S, the first block_size % S steps one more
        uniform     tokens_per_step; with `steps`, n // S, the first n % S steps one more
        timesteps   int(m (1 - s/t)) of the m that are left, on S + 1 even times from 1 to 0.001; the last step the rest
        ancestral   see Schedule.count

    Static and uniform differ where tokens of the block are given. Steps that would commit nothing take no forward: it
    would compute what the one before did.

    Args:
        begun: masked positions of the block before its first forward.
        block_size: tokens of a block.
        sampling: its schedule, steps and tokens_per_step.
    Source: uniform is get_num_transfer_tokens of LLaDA (arXiv:2502.09992), static that of SDAR (arXiv:2510.06303),
        timesteps the loop of Dream's diffusion_generate (arXiv:2508.15487). Differs from the released code: SDAR's
        counts go on where fewer positions are masked, and then overwrite given tokens.
    """
    if sampling.schedule == "timesteps":
        return _timesteps(begun, sampling.steps_per_block(block_size))
    if sampling.steps is None:
        return (sampling.tokens_per_step,)
    number, steps = begun if sampling.schedule == "uniform" else block_size, sampling.steps_per_block(block_size)
    each, more = divmod(number, steps)
    return (each + 1,) * more + (each,) * (steps - more) if each else (1,) * max(more, 1)


@lru_cache(maxsize=1024)
def _timesteps(begun: int, steps: int) -> tuple[int, ...]:
    time, left, counts = _times(steps), begun, []
    # In float32, as published: a product next to a whole number would be cut to another one in float64.
    for share in (1 - time[1:-1] / time[:-2]).unbind():
        count = int(left * share)
        left -= count
        counts += [count] if count else []
    return (*counts, max(left, 1))


def _times(steps: int) -> Tensor:
    return torch.linspace(1, TIME_END, steps + 1)


def arrival(noise: Tensor, steps: int) -> Tensor:
    """The step (0-based) at which ancestral sampling unmasks each position, given a uniform number for each.

    A position that is masked at time t is unmasked by time s with probability 1 - s/t, independently of the others: its
    own time is uniform on [0, 1]. The last step unmasks the rest.

    Args:
        noise: float64 in (0, 1), of any shape.
        steps: S.
    Returns:
        int64 of the same shape.
    Source: `alg="origin"` of Dream's diffusion_generate; Sahoo et al. 2024 (MDLM), arXiv:2406.07524.
    """
    inner = _times(steps)[1:-1].flip(0).to(noise.device, torch.float64)
    return len(inner) - torch.searchsorted(inner, noise, right=True)


class Schedule:
    """Counts for batches of rows that are at different forwards of different blocks, without a loop over rows."""

    def __init__(self, sampling: Sampling, block_size: int, begun: Tensor, device: torch.device) -> None:
        """Tabulate a sampling's schedule.

        Args:
            sampling: its schedule, steps and tokens_per_step.
            block_size: tokens of a block.
            begun: int64 on the CPU, any shape; every number of masked positions that a block can begin with.
            device: of the rows.
        Raises:
            UserError: the steps of the canvas do not divide over its blocks.
        """
        self._arrival_steps = sampling.steps_per_block(block_size) if sampling.schedule == "ancestral" else None
        sizes = torch.unique(begun)
        lists = [commits(size, block_size, sampling) for size in sizes.tolist()]
        width = max((len(counts) for counts in lists), default=0)
        table = [[*counts, *counts[-1:] * (width - len(counts))] for counts in lists]
        self._sizes, self._table = sizes.to(device), torch.tensor(table, dtype=torch.int64, device=device)

    def count(
        self, active: Tensor, inside: Tensor, step: Tensor, *, key: Tensor, forward: Tensor, position: Tensor
    ) -> Tensor:
        """(N,) int64: positions to commit now, at most those that are active.

        Ancestral: by the next step at which a position of the block arrives (`arrival`), as many should be committed as
        arrive until then. Which ones is the strategy's choice; random is the reverse process.

        Args:
            active: (N, W) bool; masked positions of the active block.
            inside: (N, W) bool; all positions of the active block.
            step: (N, W) int64; the forward that committed each position, GIVEN where none has.
            key: (N,) int64; counter of the row's randomness.
            forward: (N,) int64; forwards that the row has taken.
            position: (N, W) int64; in the row.
        """
        decoded = inside & (step != GIVEN)
        begun = active | decoded
        if self._arrival_steps is not None:
            due = arrival(uniform(key[:, None], 0, position, ARRIVAL_NOISE), self._arrival_steps)
            due, done = due.masked_fill(~begun, self._arrival_steps), decoded.sum(-1, keepdim=True)
            now = due.sort(dim=-1).values.gather(-1, done.clamp(max=due.shape[-1] - 1))
            return ((due <= now) & begun).sum(-1) - done.squeeze(-1)
        # Every forward commits something, so the block's first one is the earliest that any of its tokens names.
        start = torch.where(decoded, step, forward[:, None]).amin(-1)
        size = torch.searchsorted(self._sizes, begun.sum(-1)).clamp(max=len(self._sizes) - 1)
        taken = (forward - start).clamp(max=self._table.shape[1] - 1)
        return self._table[size, taken].minimum(active.sum(-1))
