"""What differs between model families: names, configuration keys, shift and attention pattern. Nothing else does."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from dllm_rl import registry
from dllm_rl.errors import UserError
from dllm_rl.models.rotary import FLOAT32_ROTARY, Float32Rotary
from dllm_rl.models.unembedding import Float32Logits
from dllm_rl.types import BlockOrigin

_LAYER = "{i}"  # stands for a layer number in a pair of names

# Linear layers and config.json keys that Llama, Qwen2 and Qwen3 share.
LINEAR_LAYERS = {
    **{f"{name}_proj": f"self_attn.{name}_proj" for name in ("q", "k", "v", "o")},
    **{f"{name}_proj": f"mlp.{name}_proj" for name in ("gate", "up", "down")},
}
SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """An adapter: how checkpoints of a family map onto one of transformers' own modules.

    A plugin of kind "families" is an instance. Checkpoints whose config.json it matches are loaded with it; others, and
    new models, when model.family names it.

    Attributes:
        name: how messages call the family; the name of its entry point, if it has one.
        model_type: ``model_type`` in the family's config.json.
        module_class: the transformers module with the same equations: a causal language model whose backbone is its
            ``base_model`` and takes boolean 4D masks, positions and a cache.
        to_transformers: config.json -> keyword arguments of the module's configuration; raises UserError for
            options that the module does not compute.
        new_config: sizes and special tokens of a new model, in the config.json keys that Llama, Qwen2 and Qwen3 share
            (models/create.py) -> config.json in the family's own keys.
        architectures: of them config.json's ``architectures`` must hold one, where it has any.
        required_keys: config.json keys that tell the family from others of its model_type; null, false or 0 is absent.
        absent_keys: keys that such others have.
        max_length_key: config.json key of the longest sequence.
        lora_targets: linear layers by the family's own name -> name of the layer in the module.
        names: (original, transformers) module names that differ; "{i}" stands for a layer number.
        mask_token: text of the mask token, for checkpoints whose config.json does not name its id.
        shift: the network predicts position i at i - 1.
        block_causal: attention is block-causal, with a block size.
        block_origin: where its blocks start, for checkpoints whose config.json does not say: "response" or "sequence".
        tokenizer_substitutes: remote tokenizer class -> transformers class that reads the same files.
    """

    name: str
    model_type: str
    module_class: type[PreTrainedModel]
    to_transformers: Callable[[Mapping[str, Any]], dict[str, Any]]
    new_config: Callable[[Mapping[str, Any]], dict[str, Any]]
    lora_targets: Mapping[str, str]
    architectures: tuple[str, ...] = ()
    required_keys: tuple[str, ...] = ()
    absent_keys: tuple[str, ...] = ()
    max_length_key: str = "max_position_embeddings"
    names: tuple[tuple[str, str], ...] = ()
    mask_token: str = "<|MASK|>"
    shift: bool = False
    block_causal: bool = False
    block_origin: BlockOrigin = "response"
    tokenizer_substitutes: Mapping[str, str] = field(default_factory=dict)

    def matches(self, config: Mapping[str, Any]) -> bool:
        """Whether a config.json is of this family; override it where names and keys do not tell."""
        declared = config.get("architectures") or self.architectures
        return (
            config.get("model_type") == self.model_type
            and (not self.architectures or not set(self.architectures).isdisjoint(declared))
            and all(config.get(key) for key in self.required_keys)
            and not any(config.get(key) for key in self.absent_keys)
        )

    def to_module_name(self, name: str) -> str:
        """Name in the transformers module of a weight or module named as in the family's checkpoints."""
        return _translate(name, self.names)

    def to_original_name(self, name: str) -> str:
        """Name in the family's checkpoints of a weight or module named as in the transformers module."""
        return _translate(name, ((theirs, ours) for ours, theirs in self.names))

    def declared(self, clause: Literal["to_transformers", "new_config"], argument: Mapping[str, Any]) -> dict[str, Any]:
        """What a function of the family gives.

        Raises:
            UserError: the function is of other people, and raised or gave something else than a dict.
        """
        function = getattr(self, clause)
        with registry.plugin_boundary("families", self.name, f"{clause}()", function.__module__):
            found: dict[str, Any] = function(argument)
        if not isinstance(found, dict):
            raise UserError(
                f"model family '{self.name}': {clause}() must return a dict, returned {type(found).__name__}"
            )
        return found

    def skeleton(self, config: Mapping[str, Any], dtype: torch.dtype) -> PreTrainedModel:
        """The module on the meta device: no memory, no random numbers drawn.

        Args:
            config: the family's config.json.
            dtype: parameter type. In float64 the norms compute in float64 too (transformers' own round to float32),
                so that float64 is exact enough to verify gradients and invariances.
        """
        options = {"attn_implementation": "sdpa", "use_cache": False, **self.declared("to_transformers", config)}
        settings: PretrainedConfig = self.module_class.config_class(**options)
        with torch.device("meta"):
            module = self.module_class(settings).to(dtype)
            head = module.get_output_embeddings()
            shape = (head.in_features, head.out_features, head.bias is not None)
            module.set_output_embeddings(Float32Logits(*shape, dtype=dtype))
            if options["attn_implementation"] == FLOAT32_ROTARY:
                module.base_model.rotary_emb = Float32Rotary(settings)
            if dtype == torch.float64:
                _norms_in_native_precision(module)
        return module.eval()


def finish(module: PreTrainedModel, device: torch.device | str) -> None:
    """Fill in what checkpoints do not hold: tied embeddings and rotary frequencies (float32 in every dtype).

    Raises:
        UserError: a module with other buffers, which would stay undefined.
    """
    backbone = module.base_model
    if module.config.tie_word_embeddings:
        module.get_output_embeddings().weight = module.get_input_embeddings().weight
    if hasattr(backbone, "rotary_emb"):
        backbone.rotary_emb = type(backbone.rotary_emb)(config=module.config).to(device)
    others = [name for name, _ in module.named_buffers() if "rotary_emb" not in name]
    if others:
        raise UserError(f"{type(module).__name__}: buffer {others[0]} is neither a weight nor a rotary frequency")


def _norms_in_native_precision(module: nn.Module) -> None:
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if type(child).__name__.endswith("RMSNorm"):
                width: int = child.weight.shape[0]  # type: ignore[index, assignment]
                epsilon: float = child.variance_epsilon  # type: ignore[assignment]
                setattr(parent, name, nn.RMSNorm(width, eps=epsilon, dtype=torch.float64))


def _translate(name: str, pairs: Iterable[tuple[str, str]]) -> str:
    for source, target in pairs:
        pattern = re.escape(source).replace(re.escape(_LAYER), r"(?P<i>\d+)")
        match = re.match(rf"{pattern}(?=\.|$)", name)
        if match:
            layer = match.groupdict().get("i") or ""
            return target.replace(_LAYER, layer) + name[match.end() :]
    return name


def require(config: Mapping[str, Any], family: str, expected: Mapping[str, tuple[Any, Any]]) -> None:
    """Check options that the transformers module has no equivalent for.

    Args:
        config: config.json.
        family: name for the message.
        expected: key -> (value the family's own code assumes when the key is absent, the only value we compute).
    Raises:
        UserError: naming the first key with another value.
    """
    for key, (default, wanted) in expected.items():
        value = config.get(key, default)
        if value != wanted and not (wanted is False and value is None):
            raise UserError(f"config.json: {key} = {value!r} is not supported for family '{family}', only {wanted!r}")


def pick(config: Mapping[str, Any], family: str, keys: Iterable[str]) -> dict[str, Any]:
    """The given keys of config.json.

    Raises:
        UserError: naming the keys that are absent.
    """
    keys = tuple(keys)
    absent = [key for key in keys if key not in config]
    if absent:
        raise UserError(f"config.json of family '{family}' lacks {', '.join(absent)}; is the checkpoint complete?")
    return {key: config[key] for key in keys}


def rope(config: Mapping[str, Any], default_theta: float = 10000.0) -> dict[str, Any]:
    """The ``rope_parameters`` of transformers from either the current or the older rope_theta / rope_scaling keys."""
    if config.get("rope_parameters"):
        return dict(config["rope_parameters"])
    scaling = dict(config.get("rope_scaling") or {})
    kind = scaling.pop("type", None) or scaling.pop("rope_type", None) or "default"
    return {"rope_type": kind, "rope_theta": float(config.get("rope_theta", default_theta)), **scaling}


def hugging_face_options(config: Mapping[str, Any], family: str) -> dict[str, Any]:
    """Options of a LlamaConfig, Qwen2Config or Qwen3Config from the keys that they share."""
    return {
        **pick(config, family, SIZES),
        "tie_word_embeddings": config.get("tie_word_embeddings", False),
        "rope_parameters": rope(config),
        "rms_norm_eps": config.get("rms_norm_eps", 1e-6),
        "hidden_act": config.get("hidden_act", "silu"),
        "attention_dropout": config.get("attention_dropout", 0.0),
    }
