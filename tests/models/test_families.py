import dataclasses

import pytest
import torch
from transformers import LlamaForCausalLM

from dllm_rl import registry
from dllm_rl.errors import UserError
from dllm_rl.models.create import create_denoiser
from dllm_rl.models.families import family_named, family_of

# config.json of the published checkpoints (the keys that matter), and their number of parameters.
LLADA_8B = {
    "model_type": "llada",
    "activation_type": "silu",
    "alibi": False,
    "attention_layer_norm": False,
    "bias_for_layer_norm": False,
    "block_group_size": 1,
    "block_type": "llama",
    "d_model": 4096,
    "embedding_size": 126464,
    "include_bias": False,
    "include_qkv_bias": False,
    "input_emb_norm": False,
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "mask_token_id": 126336,
    "max_sequence_length": 4096,
    "mlp_hidden_size": 12288,
    "mlp_ratio": 4,
    "multi_query_attention": None,
    "n_heads": 32,
    "n_kv_heads": 32,
    "n_layers": 32,
    "rms_norm_eps": 1e-05,
    "rope": True,
    "rope_theta": 500000.0,
    "scale_logits": False,
    "vocab_size": 126464,
    "weight_tying": False,
}
DREAM_7B = {
    "model_type": "Dream",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "mask_token_id": 151666,
    "max_position_embeddings": 131072,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_mrope": False,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
SDAR_8B = {
    "model_type": "sdar",
    "attention_bias": False,
    "block_size": 4,
    "head_dim": 128,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "mask_token_id": 151669,
    "max_position_embeddings": 32768,
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
PUBLISHED = {
    "llada": (LLADA_8B, 8_015_581_184, 500000.0),
    "dream": (DREAM_7B, 7_615_616_512, 1000000.0),
    "sdar": (SDAR_8B, 8_190_735_360, 1000000.0),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_give_the_published_sizes(name):
    config, num_parameters, theta = PUBLISHED[name]
    module = family_named(name).skeleton(config, torch.bfloat16)  # on the meta device: no memory
    assert sum(p.numel() for p in module.parameters()) == num_parameters
    assert module.config.rope_parameters == {"rope_type": "default", "rope_theta": theta}
    assert module.config.rms_norm_eps == config["rms_norm_eps"]
    assert module.config._attn_implementation == ("sdpa_float32_rotary" if name == "llada" else "sdpa")


@pytest.mark.parametrize("name", registry.names("families"))
def test_names_translate_both_ways(make, name):
    family = family_named(name)
    for ours in dict(make(name).module.named_parameters()):
        original = family.to_original_name(ours)
        assert family.to_module_name(original) == ours
        assert (original == ours) == (name != "llada")


def test_every_layer_number_and_no_look_alike_is_translated():
    to_module = family_named("llada").to_module_name
    assert to_module("model.transformer.blocks.31.ff_out.weight") == "model.layers.31.mlp.down_proj.weight"
    assert to_module("model.transformer.ff_out.weight") == "lm_head.weight"
    assert to_module("model.transformer.ff_out_2.weight") == "model.transformer.ff_out_2.weight"


def test_scaled_rotary_embeddings_keep_their_type():
    scaled = DREAM_7B | {"rope_scaling": {"type": "linear", "factor": 2.0}}
    module = family_named("dream").skeleton(scaled, torch.float32)
    assert module.config.rope_parameters["rope_type"] == "linear"
    assert module.config.rope_parameters["factor"] == 2.0


def test_an_unknown_family_names_the_nearest():
    with pytest.raises(ValueError, match="unknown model family 'lada'; nearest is 'llada'"):
        family_named("lada")
    with pytest.raises(ValueError, match="known: dream, llada, sdar, tiny"):
        family_named("gpt")


ARCHITECTURES = {"llada": "LLaDAModelLM", "dream": "DreamModel", "sdar": "SDARForCausalLM"}
# The keys that matter of config.json files whose model_type is a built-in family's, but whose equations are not.
FOREIGN = {
    "LLaDA-MoE": {
        "architectures": ["LLaDAMoEModelLM"],
        "model_type": "llada",
        "hidden_size": 2048,
        "num_attention_heads": 16,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 16,
    },
    "DreamReasoner": {
        "architectures": ["DreamForCausalLM"],
        "model_type": "Dream",
        "block_size": 32,
        "head_dim": 128,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "mask_token_id": 151669,
        "max_position_embeddings": 32768,
        "num_attention_heads": 32,
        "num_hidden_layers": 36,
        "num_key_value_heads": 8,
        "vocab_size": 151936,
    },
    "the language model of LLaDA-V": {
        "model_type": "llada",
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
    },
    "SDAR with experts": SDAR_8B | {"num_experts": 128},
}


@pytest.mark.parametrize("declared", [True, False, None])
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_configuration_is_recognised(name, declared):
    """Also where the file leaves its architectures out, or holds null."""
    more = {"architectures": [ARCHITECTURES[name]] if declared else None} if declared is not False else {}
    assert family_of(PUBLISHED[name][0] | more, "x") is family_named(name)


@pytest.mark.parametrize("architectures", [True, False])
@pytest.mark.parametrize("name", FOREIGN)
def test_another_model_of_the_same_model_type_is_not_taken_for_it(name, architectures):
    """By its architectures; by its keys too, where the file declares none."""
    config = FOREIGN[name] if architectures else FOREIGN[name] | {"architectures": []}
    with pytest.raises(UserError) as raised:
        family_of(config, "some/model")
    text = str(raised.value)
    assert text.startswith("some/model: unknown model family, model_type = '") and "\n" not in text
    assert repr(config.get("architectures")) in text and "set model.family" in text
    assert "dream (Dream DreamModel without block_size" in text and "tiny (dllm_rl_tiny)" in text


@pytest.mark.parametrize("name", PUBLISHED)
def test_architectures_tell_models_of_the_same_keys_apart(name):
    config = PUBLISHED[name][0] | {"architectures": ["OtherForCausalLM"]}
    with pytest.raises(UserError, match=r"architectures = .'OtherForCausalLM'. in config.json"):
        family_of(config, "x")
    assert family_of(config | {"architectures": ["OtherForCausalLM", ARCHITECTURES[name]]}, "x").name == name


@pytest.mark.parametrize(
    ("name", "family", "message"),
    [
        ("LLaDA-MoE", "llada", "num_experts = 64 is not supported for family 'llada'"),
        ("DreamReasoner", "dream", "block_size = 32 is not supported for family 'dream'"),
        ("the language model of LLaDA-V", "llada", "block_type = 'sequential' is not supported"),
        ("SDAR with experts", "sdar", "num_experts = 128 is not supported for family 'sdar'"),
    ],
)
def test_a_family_that_is_named_still_refuses_what_it_does_not_compute(name, family, message):
    with pytest.raises(UserError, match=message):
        family_named(family).skeleton(FOREIGN[name], torch.float32)


def test_a_family_may_be_named_for_a_model_that_says_otherwise():
    """A Qwen2 checkpoint that was trained as Dream is."""
    config = DREAM_7B | {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "num_hidden_layers": 1}
    with pytest.raises(UserError, match=r"model_type = 'qwen2', architectures = .'Qwen2ForCausalLM'."):
        family_of(config, "x")
    family_named("dream").skeleton(config, torch.bfloat16)


def test_several_families_that_match_are_named(monkeypatch):
    found = {"dream": family_named("dream"), "other": dataclasses.replace(family_named("dream"), name="other")}
    monkeypatch.setattr(registry, "names", lambda kind: sorted(found))
    monkeypatch.setattr(registry, "load", lambda kind, name: found[name])
    with pytest.raises(UserError, match=r"x: several model families match .*: dream, other; set model.family to one"):
        family_of(DREAM_7B, "x")


class Biased(LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self.register_buffer("expert_bias", torch.ones(2))


def test_a_buffer_that_nothing_would_fill_is_refused(tokenizer, monkeypatch):
    biased = dataclasses.replace(family_named("tiny"), module_class=Biased)
    monkeypatch.setattr("dllm_rl.models.create.family_named", lambda name: biased)
    with pytest.raises(UserError, match="Biased: buffer expert_bias is neither a weight nor"):
        create_denoiser("tiny", tokenizer, hidden_size=16, num_layers=1, num_heads=2, max_length=8, seed=0)


def test_what_is_no_family_is_refused():
    with pytest.raises(UserError, match=r"'dllm_rl.models.sdar:new_config' is a function, expected a dllm_rl.models"):
        family_named("dllm_rl.models.sdar:new_config")
