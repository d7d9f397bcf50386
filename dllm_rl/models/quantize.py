"""Frozen weights in 4 bits below a trained adapter (QLoRA), through bitsandbytes.

Source: Dettmers et al. 2023, arXiv:2305.14314: 4-bit NormalFloat in blocks of 64, with quantised block scales.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dllm_rl.errors import UserError, require_package
from dllm_rl.models.denoiser import TransformersDenoiser

DTYPES = (torch.bfloat16, torch.float32)  # that layers compute in; others have no kernels


def quantize(denoiser: TransformersDenoiser, device: torch.device) -> int:
    """Move a network to a device with the linear layers of its transformer layers in 4 bits; the rest stays as it is.

    Embeddings and the output layer are left alone, as in the paper. Layers are moved one by one: the device never holds
    more than one of them unquantised.

    Args:
        denoiser: changed in place; on the CPU, without an adapter.
        device: where to.
    Returns:
        Number of layers that were quantised.
    Raises:
        UserError: bitsandbytes is not installed, or has no kernels for the dtype.
    """
    require_package("bitsandbytes", "qlora", "model.quantize")
    import bitsandbytes

    network = denoiser.module
    head = network.get_output_embeddings()
    linear = [(path, m) for path, m in network.named_modules() if isinstance(m, nn.Linear) and m is not head]
    for path, layer in linear:
        dtype = layer.weight.dtype
        if dtype not in DTYPES:
            raise UserError(f"model.quantize: 4-bit layers cannot compute in {dtype}; set model.dtype: bfloat16")
        small = bitsandbytes.nn.Linear4bit(
            layer.in_features, layer.out_features, layer.bias is not None, dtype, quant_type="nf4", device="meta"
        )
        small.weight = bitsandbytes.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
        small.bias = layer.bias
        parent, _, leaf = path.rpartition(".")
        setattr(network.get_submodule(parent), leaf, small.to(device))  # the move quantises
    network.to(device)
    network.is_loaded_in_4bit = True  # peft asks
    return len(linear)


def whole(parameter: nn.Parameter) -> Tensor:
    """A weight as its layer computes with it: unpacked if it is in 4 bits, else itself."""
    state: Any = getattr(parameter, "quant_state", None)
    if state is None:
        return parameter.detach()
    from bitsandbytes.functional import dequantize_4bit

    unpacked: Tensor = dequantize_4bit(parameter.detach(), state)
    return unpacked
