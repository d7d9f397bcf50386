"""A family with one fault is caught by the check that is meant for it."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM, LlamaModel, Qwen3ForCausalLM, Qwen3Model

from dllm_rl.cli.main import main
from dllm_rl.conformance.suite import CHECKS, check_plugin
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


FAULTS = [
    ("CLAIMS_ANOTHERS", "it_alone_recognises_its_config"),
    ("IS_NOT_ALONE", "it_alone_recognises_its_config"),
    ("TWO_OF_ONE_NAME", "names_translate_both_ways"),
    ("SWAPS", "a_checkpoint_comes_back"),
    ("FORGETS", "what_it_does_not_know_is_kept"),
    ("HIDES_WITH_PADDING", "a_checkpoint_comes_back"),
    ("NO_SUCH_LAYER", "every_lora_target_matches"),
    ("CALLED_OTHERWISE", "every_lora_target_matches"),
    ("CAPS_LOGITS", "predictions_are_the_modules_own"),
    ("STAYS_CAUSAL", "predictions_depend_on_what_is_visible_alone"),
    ("SEES_PADDING", "predictions_depend_on_what_is_visible_alone"),
    ("COUNTS_ITSELF", "a_cache_changes_nothing"),
]


@pytest.fixture
def here(monkeypatch):
    """Makes this file importable under a name for "package.module:Name"."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    monkeypatch.delitem(sys.modules, "test_families", raising=False)
    return "test_families"


@pytest.mark.parametrize(("name", "check"), FAULTS)
def test_a_fault_is_caught_by_the_check_that_is_meant_for_it(here, name, check):
    found = {f.check: f.problem for f in check_plugin("families", f"{here}:{name}", {})}
    assert found[check] is not None and not found[check].startswith("raised"), found


def test_every_check_has_caught_something():
    assert {check.__name__ for check in CHECKS["families"]} == {check for _, check in FAULTS}


def test_command_line(here, capsys):
    assert main(["check-plugin", "family", f"{here}:SWAPS", "--quiet"]) == 2
    assert "a checkpoint comes back" in capsys.readouterr().out
    assert main(["check-plugin", "families", "tiny", "depth=3"]) == 2
    assert "takes no options, got depth" in capsys.readouterr().err
