"""A model family: Llama's equations under block-causal attention, with a model_type of its own."""

from __future__ import annotations

from transformers import LlamaForCausalLM

from dllm_rl.models.family import LINEAR_LAYERS, Family, hugging_face_options


def _to_transformers(config):
    return hugging_face_options(config, "acme")


def _new_config(shared):
    return {"architectures": ["AcmeLM"], "model_type": "acme", **shared}


ACME = Family(
    name="acme",
    model_type="acme",
    architectures=("AcmeLM",),
    module_class=LlamaForCausalLM,
    to_transformers=_to_transformers,
    new_config=_new_config,
    lora_targets=LINEAR_LAYERS,
    block_causal=True,
)
