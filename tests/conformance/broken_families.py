"""Model families with one fault each, for test_conformance.py."""

from __future__ import annotations

import dataclasses

import torch
from transformers import LlamaForCausalLM, LlamaModel, Qwen3ForCausalLM, Qwen3Model

from dllm_rl.models.family import Family
from dllm_rl.models.sdar import SDAR
from dllm_rl.models.tiny import TINY, new_config, to_transformers


def altered(**changes) -> Family:
    return dataclasses.replace(TINY, **changes)


CLAIMS_ANOTHERS = altered(new_config=lambda shape: new_config(shape) | {"model_type": "llama"})
IS_NOT_ALONE = altered(name="tiny again", model_type="dllm_rl_tiny")
TWO_OF_ONE_NAME = altered(
    names=(("h.{i}.in", "model.layers.{i}.mlp.up_proj"), ("h.{i}.in", "model.layers.{i}.mlp.gate_proj"))
)
NO_SUCH_LAYER = altered(lora_targets={**TINY.lora_targets, "out_proj": "self_attn.out_proj"})
CALLED_OTHERWISE = altered(lora_targets={"attn_out": "self_attn.o_proj"})
HIDES_WITH_PADDING = altered(new_config=lambda shape: new_config(shape) | {"mask_token_id": shape.pad_id})


class Swaps(Family):
    """Reads two matrices of one shape in each other's place."""

    def to_module_name(self, name):
        other = {"gate_proj": "up_proj", "up_proj": "gate_proj"}
        return ".".join(other.get(part, part) for part in name.split("."))


SWAPS = Swaps(**{field.name: getattr(TINY, field.name) for field in dataclasses.fields(TINY)})


def forgets(config):
    """Drops what it does not know from the caller's dictionary."""
    options = to_transformers(config)
    config.pop("auto_map", None)
    return options


FORGETS = altered(to_transformers=forgets)


class Capped(LlamaForCausalLM):
    """Bounds its logits behind the output layer."""

    def forward(self, **options):
        output = super().forward(**options)
        output.logits = torch.tanh(output.logits)
        return output


CAPS_LOGITS = altered(module_class=Capped)


class CausalModel(LlamaModel):
    def forward(self, *, attention_mask=None, **options):
        return super().forward(attention_mask=None, **options)


class Causal(LlamaForCausalLM):
    """Looks to the left only."""

    def __init__(self, config):
        super().__init__(config)
        self.model = CausalModel(config)


STAYS_CAUSAL = altered(module_class=Causal)


class OpenModel(LlamaModel):
    def forward(self, *, attention_mask=None, **options):
        return super().forward(attention_mask=torch.ones_like(attention_mask), **options)


class Open(LlamaForCausalLM):
    """Looks at padding too."""

    def __init__(self, config):
        super().__init__(config)
        self.model = OpenModel(config)


SEES_PADDING = altered(module_class=Open)


class CountingModel(Qwen3Model):
    def forward(self, input_ids, *, position_ids, **options):
        own = torch.arange(input_ids.shape[1])[None]
        return super().forward(input_ids, position_ids=own, **options)


class Counting(Qwen3ForCausalLM):
    """Counts positions from the start of what it is given, not of the sequence."""

    def __init__(self, config):
        super().__init__(config)
        self.model = CountingModel(config)


COUNTS_ITSELF = dataclasses.replace(SDAR, module_class=Counting)
