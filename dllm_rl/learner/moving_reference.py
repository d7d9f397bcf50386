"""A reference that follows the policy: an exponential moving average of its weights.

After every so many optimiser updates,  reference <- weight * policy + (1 - weight) * reference.

What is averaged are the parameters that forwards compute with, not the float32 masters behind them: those are sharded
over ranks, and there are none with stochastic rounding. Averages are computed in float32 and, where the reference is
bfloat16, rounded at random: to the nearest, a weight of 0.6 would copy and one of 0.4 would never move what is a single
bfloat16 away, which is most of what a few dozen updates change. Where both are the same nothing is rounded.

An average of two adapters, (1 - w) B' A' + w B A, has twice their rank. The reference is the nearest product of their
rank (Eckart and Young), which the first move reaches exactly. An average of A's and of B's is another one: it is off by
w (1 - w) (B - B') (A - A'), and at the start of a run the whole of B is the difference.

Source: Gorbatovski et al. 2024, arXiv:2404.09656, soft update (alpha there is the weight). The released code of
DiffuCoder (arXiv:2506.20639) and ESPO (arXiv:2512.03759) leaves it to TRL, which blends in place in the dtype of the
model: that changes 8% of bfloat16 weights even where policy and reference agree. With adapters, it moves nothing there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import Tensor, nn

from dllm_rl.config.cluster import ReferenceSection
from dllm_rl.learner.master_weights import stochastically_rounded
from dllm_rl.seeding import derive

Reading = Callable[..., AbstractContextManager[None]]  # TorchLearner.reading
_CHUNK = 1 << 24  # elements at a time: float32 copies of a whole embedding would take gigabytes


class MovingReference:
    """What moves: parameters of the reference beside those that they follow.

    Attributes:
        updates: optimiser updates so far.
    """

    def __init__(
        self,
        pairs: Sequence[tuple[Sequence[nn.Parameter], Sequence[nn.Parameter]]],
        config: ReferenceSection,
        *,
        seed: int,
    ) -> None:
        """Start at update 0.

        Args:
            pairs: (of the reference, of the policy): one parameter each, or A and B of an adapted layer.
            config: how often it moves, and by how much.
            seed: of rounding.
        """
        self.updates, self._pairs, self._config, self._seed = 0, pairs, config, seed
        self._own = [parameter for own, _ in pairs for parameter in own]

    def updated(self, reading: Reading) -> None:
        """Count an optimiser update, and move if it is time; all ranks together.

        Args:
            reading: makes parameters whole; see TorchLearner.reading.
        """
        self.updates += 1
        if self.updates % self._config.every == 0:
            for place, (own, policy) in enumerate(self._pairs):
                # One layer after the other: with sharded parameters no more than one is whole at a time.
                with torch.no_grad(), reading(policy), reading(own, writing=True):
                    if len(own) == 1:
                        self._average(own[0], policy[0], place)
                    else:
                        _average_products(own, policy, self._config.weight)

    def save(self, path: Path, reading: Reading, *, writes: bool) -> None:
        """Write its weights and the number of updates.

        Args:
            path: a file.
            reading: makes parameters whole.
            writes: this rank does it; all ranks call.
        """
        with reading(self._own):
            if writes:
                torch.save({"updates": self.updates, "weights": [one.detach() for one in self._own]}, path)

    def load(self, path: Path, reading: Reading) -> None:
        """Restore what save wrote, bit for bit, on any number of ranks."""
        state = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
        self.updates = state["updates"]
        with torch.no_grad(), reading(self._own, writing=True):
            for parameter, value in zip(self._own, state["weights"], strict=True):
                parameter.copy_(value)

    def _average(self, own: Tensor, policy: Tensor, place: int) -> None:
        generator = torch.Generator(own.device).manual_seed(derive(self._seed, "reference", self.updates, place))
        wide = torch.promote_types(own.dtype, torch.float32)
        for kept, new in zip(own.view(-1).split(_CHUNK), policy.view(-1).split(_CHUNK), strict=True):
            value = torch.lerp(kept.to(wide), new.to(wide), self._config.weight)
            kept.copy_(stochastically_rounded(value, generator) if own.dtype == torch.bfloat16 else value)


def _average_products(own: Sequence[Tensor], policy: Sequence[Tensor], weight: float) -> None:
    """Make B' A' of the reference the product of its rank that is nearest to (1 - weight) B' A' + weight B A."""
    (kept_a, kept_b), (a, b) = own, policy
    wide = torch.promote_types(kept_a.dtype, torch.float32)
    down = torch.cat([kept_a, a]).to(wide)  # (2 r, in)
    up = torch.cat([(1 - weight) * kept_b.to(wide), weight * b.to(wide)], dim=1)  # (out, 2 r)
    (basis_up, up), (basis_down, down) = torch.linalg.qr(up), torch.linalg.qr(down.T)
    left, scale, right = torch.linalg.svd(up @ down.T, full_matrices=False)  # of 2 r x 2 r, not of the whole layer
    rank = min(len(kept_a), len(scale))  # a layer can be smaller than the rank
    root = scale[:rank].sqrt()
    kept_a.zero_()
    kept_b.zero_()
    kept_a[:rank] = root[:, None] * (right[:rank] @ basis_down.T)
    kept_b[:, :rank] = basis_up @ left[:, :rank] * root
