"""Float32 weights behind parameters of low precision, which cannot hold small changes.

The bfloat16 after 0.02 is 1e-4 away: an update of 1e-6 is rounded to nothing, and gradients of many micro-batches stop
adding up. AdamW therefore works on float32 copies, and gradients are summed in float32. With stochastic rounding no
copies are kept: a parameter is stepped in float32 and rounded up or down at random, right on average; that saves four
bytes per parameter.

Source: Micikevicius et al. 2018, arXiv:1710.03740 (master weights); Zamirai et al. 2020, arXiv:2010.06192 (rounding).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

_NOISE_BITS = 16  # of a float32 that a bfloat16 does not have


class MasterWeights:
    """What AdamW steps on: float32 copies of bfloat16 and float16 parameters, other parameters themselves.

    Attributes:
        weights: one per parameter; empty between steps if they are not kept.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], *, keep: bool) -> None:
        """Copy, and take over gradients as they come.

        Args:
            parameters: what is trained; their ``grad`` is taken away after each backward, where there is a copy.
            keep: hold the copies between steps; else parameters are rounded at random (bfloat16 alone).
        """
        self._parameters, self._keep = list(parameters), keep
        self._low = [p.dtype in (torch.bfloat16, torch.float16) for p in parameters]
        self._sums: list[Tensor | None] = [None] * len(self._parameters)
        self.weights: list[nn.Parameter] = []
        for place, (p, low) in enumerate(zip(self._parameters, self._low, strict=True)):
            empty = p.new_empty(0, dtype=torch.float32)
            self.weights.append(nn.Parameter(p.detach().float() if keep else empty) if low else p)
            if low:
                p.register_post_accumulate_grad_hook(self._taking(place))

    def zero_grad(self) -> None:
        """Forget gradients."""
        self._sums = [None] * len(self._sums)
        for p in self._parameters:
            p.grad = None

    def gradients(self) -> list[Tensor]:
        """The sums so far of the parameters that have any; float32 where there is a copy."""
        pairs = zip(self._sums, self._parameters, self._low, strict=True)
        found = [total if low else p.grad for total, p, low in pairs]
        return [one for one in found if one is not None]

    def step(self, adam: Callable[[], object], generator: torch.Generator | None) -> None:
        """Let AdamW change the weights, and write them into the parameters.

        Args:
            adam: steps every weight that has a gradient.
            generator: on the parameters' device; decides the rounding of weights that are not kept.
        """
        low = [place for place, total in enumerate(self._sums) if total is not None]
        for place in low if self._keep else ():
            self.weights[place].grad = self._sums[place]
        adam()
        with torch.no_grad():
            if not self._keep:
                self._step_each(low, adam, generator)
                return
            for place in low:
                self._parameters[place].copy_(self.weights[place])
                self.weights[place].grad = None

    def state_dict(self) -> list[Tensor | None]:
        """The copies that are kept; parameters alone do not tell them."""
        pairs = zip(self.weights, self._low, strict=True)
        return [weight.detach() if low and self._keep else None for weight, low in pairs]

    def load_state_dict(self, state: Sequence[Tensor | None]) -> None:
        """Restore state_dict()."""
        with torch.no_grad():
            for weight, value in zip(self.weights, state, strict=True):
                if value is not None:
                    weight.copy_(value)

    def _step_each(self, low: Sequence[int], adam: Callable[[], object], generator: torch.Generator | None) -> None:
        """One parameter after the other: all at once would take the memory that is to be saved."""
        for p in self._parameters:
            p.grad = None  # those of full precision have been stepped
        for place in low:
            weight, parameter = self.weights[place], self._parameters[place]
            weight.data, weight.grad = parameter.detach().float(), self._sums[place]
            adam()
            parameter.copy_(stochastically_rounded(weight.detach(), generator))
            weight.data, weight.grad = weight.data.new_empty(0), None

    def _taking(self, place: int) -> Callable[[Tensor], None]:
        """A hook that adds a gradient to its sum, before the next one could be added to it in low precision."""

        def take(parameter: Tensor) -> None:
            gradient, parameter.grad = parameter.grad, None
            assert gradient is not None, "it has just been accumulated"
            total = self._sums[place]
            self._sums[place] = gradient.float() if total is None else total.add_(gradient)

        return take


def stochastically_rounded(value: Tensor, generator: torch.Generator | None) -> Tensor:
    """Bfloat16 neighbours of float32 values: the upper one with a probability of the distance from the lower one.

    Args:
        value: any shape, finite.
        generator: on the device of the values.
    """
    bits = value.contiguous().view(torch.int32)
    noise = torch.randint(1 << _NOISE_BITS, bits.shape, dtype=torch.int32, device=bits.device, generator=generator)
    return ((bits + noise) >> _NOISE_BITS << _NOISE_BITS).view(torch.float32).bfloat16()
