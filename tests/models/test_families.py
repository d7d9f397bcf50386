import pytest
import torch

from dllm_rl.models.families import FAMILIES, family_named

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
    module = FAMILIES[name].skeleton(config, torch.bfloat16)  # on the meta device: no memory
    assert sum(p.numel() for p in module.parameters()) == num_parameters
    assert module.config.rope_parameters == {"rope_type": "default", "rope_theta": theta}
    assert module.config.rms_norm_eps == config["rms_norm_eps"]
    assert module.config._attn_implementation == ("sdpa_float32_rotary" if name == "llada" else "sdpa")


@pytest.mark.parametrize("name", FAMILIES)
def test_names_translate_both_ways(make, name):
    family = FAMILIES[name]
    for ours in dict(make(name).module.named_parameters()):
        original = family.to_original_name(ours)
        assert family.to_module_name(original) == ours
        assert (original == ours) == (name != "llada")


def test_every_layer_number_and_no_look_alike_is_translated():
    to_module = FAMILIES["llada"].to_module_name
    assert to_module("model.transformer.blocks.31.ff_out.weight") == "model.layers.31.mlp.down_proj.weight"
    assert to_module("model.transformer.ff_out.weight") == "lm_head.weight"
    assert to_module("model.transformer.ff_out_2.weight") == "model.transformer.ff_out_2.weight"


def test_scaled_rotary_embeddings_keep_their_type():
    scaled = DREAM_7B | {"rope_scaling": {"type": "linear", "factor": 2.0}}
    module = FAMILIES["dream"].skeleton(scaled, torch.float32)
    assert module.config.rope_parameters["rope_type"] == "linear"
    assert module.config.rope_parameters["factor"] == 2.0


def test_an_unknown_family_names_the_nearest():
    with pytest.raises(ValueError, match="unknown model family 'lada'; nearest is 'llada'"):
        family_named("lada")
    with pytest.raises(ValueError, match="known: llada, dream, sdar, tiny"):
        family_named("gpt")
