"""A run's model without its weights: parameters, adapters and the exact bytes of what a learner holds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from dllm_rl.config.schema import Config
from dllm_rl.learner.zero import zero_stage
from dllm_rl.models.denoiser import TransformersDenoiser
from dllm_rl.models.family import finish
from dllm_rl.models.from_config import DTYPES
from dllm_rl.models.lora import add_lora

_BLOCK, _GROUP = 64, 256  # weights that share a scale, scales that share one of their own: bitsandbytes' defaults
_TABLES = 4 * (16 + _GROUP + 1)  # per layer: levels of the weights and of the scales, the mean of the scales; float32
LOW = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True, kw_only=True)
class States:
    """Bytes that a learner rank holds between updates; gradients are what is there when the optimiser steps.

    Attributes:
        weights: parameters and buffers, the adapter's too.
        masters: float32 copies that AdamW steps on.
        moments: of AdamW, with its counts of steps.
        gradients: of the model in its own precision, or their float32 sums.
        second_adapter: of a reference that moves.
        trained: number of trained parameters.
    """

    weights: int
    masters: int
    moments: int
    gradients: int
    second_adapter: int
    trained: int


def planned_model(denoiser: TransformersDenoiser, config: Config) -> TransformersDenoiser:
    """Another model of the same kind on the meta device, with the adapter and the options of a configuration.

    Args:
        denoiser: gives the family, config.json and token ids.
        config: of the run.
    Raises:
        UserError: a target of the adapter that matches no module.
    """
    made = TransformersDenoiser(
        denoiser.family.skeleton(denoiser.config, DTYPES[config.model.dtype]),
        denoiser.family,
        denoiser.config,
        mask_id=denoiser.mask_id,
        eos_id=denoiser.eos_id,
        pad_id=denoiser.pad_id,
        end_ids=denoiser.end_ids,
        block_size=denoiser.block_size,
        block_origin=denoiser.block_origin,
        source=denoiser.source,
    )
    finish(made.module, "meta")
    if config.model.lora is not None:
        add_lora(made, **config.model.lora.model_dump(), seed=0)
    if config.model.gradient_checkpointing:
        made.module.gradient_checkpointing_enable()
    return made


def adapted(denoiser: TransformersDenoiser) -> dict[str, tuple[int, int]]:
    """Name of a target in the family's own words -> (modules that it matches, trained parameters in them)."""
    names = {ours: theirs for theirs, ours in denoiser.family.lora_targets.items()}
    found: dict[str, tuple[int, int]] = {}
    for path, module in denoiser.module.named_modules():
        if isinstance(module, LoraLayer):
            name = next((n for suffix, n in names.items() if path.endswith(f".{suffix}")), path)
            count, size = found.get(name, (0, 0))
            found[name] = count + 1, size + sum(p.numel() for p in module.parameters() if p.requires_grad)
    return found


def states_of(denoiser: TransformersDenoiser, config: Config, *, trains: bool = True, ranks: int = 1) -> States:
    """Exact bytes of one rank.

    Args:
        denoiser: of the run, on the meta device or not, with its adapter.
        config: of the run.
        trains: whether the model is trained (not an unmasking policy alone).
        ranks: that ZeRO shards over.
    """
    learner, module = config.learner, denoiser.module
    trained = [p for p in module.parameters() if p.requires_grad] if trains else []
    weights = weight_bytes(denoiser, quantized=config.model.quantize is not None)
    second = sum(map(_size, trained)) if config.model.lora is not None and learner.reference.kind == "ema" else 0
    count = sum(p.numel() for p in trained)
    if learner.backend == "torch" or not trained:
        low = [p for p in trained if p.dtype in LOW]
        masters = 4 * sum(p.numel() for p in low) if learner.master_weights == "float32" else 0
        moments = sum(2 * p.numel() * max(4, p.itemsize) + 4 for p in trained)
        gradients = sum(p.numel() * max(4, p.itemsize) for p in trained)
        return States(
            weights=weights,
            masters=masters,
            moments=moments,
            gradients=gradients,
            second_adapter=second,
            trained=count,
        )
    stage, dtype = zero_stage(learner, trained[0].dtype), trained[0].dtype
    if stage == 0:  # in float32 alone
        gradients = 4 * count
        moments = sum(8 * p.numel() + 4 for p in trained)
        return States(
            weights=weights, masters=0, moments=moments, gradients=gradients, second_adapter=second, trained=count
        )
    shares = _shares(trained, stage, ranks)
    own = sum(shares)
    if stage == 3:
        weights -= sum(map(_size, trained)) - own * dtype.itemsize
        frozen = sum(_size(p) for p in module.parameters() if not p.requires_grad)
        weights -= frozen - -(-frozen // ranks)
    else:
        padding = sum(share * ranks for share in shares) - count  # parameters become views of one flat buffer
        weights += padding * dtype.itemsize
    return States(
        weights=weights,
        masters=0 if stage == 3 and dtype == torch.float32 else 4 * own,
        moments=8 * own + 4 * len(shares),
        gradients=4 * (count if stage == 1 else own),
        second_adapter=second,
        trained=count,
    )


def weight_bytes(denoiser: TransformersDenoiser, *, quantized: bool) -> int:
    """Bytes of parameters and buffers.

    Args:
        denoiser: the model.
        quantized: linear layers of its transformer layers are in NF4; see models/quantize.py.
    """
    module = denoiser.module
    total = sum(map(_size, _distinct((*module.parameters(), *module.buffers()))))
    if quantized:
        for layer in frozen_layers(denoiser):
            total += nf4_bytes(layer.weight.numel()) - _size(layer.weight)
    return total


def frozen_layers(denoiser: TransformersDenoiser) -> list[nn.Linear]:
    """The layers that model.quantize takes: all linear ones but the output layer and adapters."""
    head = denoiser.module.get_output_embeddings()
    return [
        layer
        for path, layer in denoiser.module.named_modules()
        if isinstance(layer, nn.Linear) and layer is not head and ".lora_" not in path
    ]


def nf4_bytes(numbers: int) -> int:
    """Bytes of a layer's weights in NF4 with double quantisation, and of what unpacks them."""
    scales = -(-numbers // _BLOCK)
    return -(-numbers // 2) + scales + 4 * -(-scales // _GROUP) + _TABLES


def cache_bytes(config: object, rows: int, prompt: int, canvas: int, block: int, itemsize: int, head: int) -> int:
    """Bytes of keys and values of a BlockCache at the end of a rollout, its spare room included.

    Args:
        config: of the transformers module.
        rows: of a batch.
        prompt: tokens of the longest prompt.
        canvas: tokens of a completion.
        block: tokens of a block.
        itemsize: bytes of a number.
        head: width of a head.
    """
    room = 3 * prompt
    for start in range(prompt, prompt + canvas, block):
        if start + block > room:
            room = max(start + block, 2 * start) + 2 * block
    layers, heads = config.num_hidden_layers, config.num_key_value_heads  # type: ignore[attr-defined]
    return int(2 * layers * rows * heads * room * head * itemsize)


def _shares(trained: Iterable[nn.Parameter], stage: int, ranks: int) -> list[int]:
    """Elements of each optimiser group (matrices, vectors) that a rank holds."""
    parameters = list(trained)
    groups: Mapping[bool, list[nn.Parameter]] = {
        wanted: [p for p in parameters if (p.dim() >= 2) == wanted] for wanted in (True, False)
    }
    if stage == 3:  # each parameter is cut by itself
        return [sum(-(-p.numel() // ranks) for p in group) for group in groups.values() if group]
    step = 2 * ranks
    return [-(-sum(p.numel() for p in group) // step) * step // ranks for group in groups.values() if group]


def _distinct(tensors: Iterable[Tensor]) -> list[Tensor]:
    return list({id(t): t for t in tensors}.values())


def _size(value: Tensor) -> int:
    return value.numel() * value.itemsize
