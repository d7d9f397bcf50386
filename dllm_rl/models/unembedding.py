"""An output layer whose logits are float32 whatever the dtype of the network.

A bfloat16 logit of 20 is known to 1/16: ratios of 1e-3 and the ranking of positions would be rounded away. The product
is summed in float32 anyway; only its result must not be rounded.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Float32Logits(nn.Linear):
    """A linear layer in bfloat16 or float16 that gives float32; in float32 and float64 it is nn.Linear.

    It stays a layer with its own forward: ZeRO 3 gathers the weight in the hooks of this call.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Logits (..., V) of states (..., D)."""
        if self.weight.dtype not in (torch.bfloat16, torch.float16):
            return super().forward(input)
        logits: Tensor = _Product.apply(input.flatten(0, -2), self.weight)
        logits = logits if self.bias is None else logits + self.bias.float()
        return logits.unflatten(0, input.shape[:-1])


class _Product(torch.autograd.Function):
    """rows @ weight^T in float32, without a float32 copy of the weight on a GPU."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weight)
        if rows.is_cuda:
            return torch.mm(rows, weight.t(), out_dtype=torch.float32)
        return rows.float() @ weight.float().t()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None]:
        rows, weight = ctx.saved_tensors
        gradient = gradients[0].to(rows.dtype)  # as autocast does: products of low precision, summed in float32
        to_rows = gradient @ weight if ctx.needs_input_grad[0] else None
        to_weight = gradient.t() @ rows if ctx.needs_input_grad[1] else None
        return to_rows, to_weight
