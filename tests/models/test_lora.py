import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from dllm_rl import registry
from dllm_rl.models.families import family_named
from dllm_rl.models.loading import load_denoiser, save_denoiser
from dllm_rl.models.lora import add_lora, load_adapter, merged_weights, reference_weights, save_adapter
from dllm_rl.seeding import generator_for

ALL = registry.names("families")
NUM_TARGETS = 7


@pytest.mark.parametrize("family", ALL)
def test_adapter_off_is_the_base_to_the_bit_and_on_is_not(make, family, hidden_of, train_a_little):
    denoiser = make(family)
    base = hidden_of(denoiser)
    assert add_lora(denoiser, rank=3, alpha=6, seed=0) == NUM_TARGETS * 2  # 2 layers
    assert torch.equal(hidden_of(denoiser), base)  # starts as the identity
    train_a_little(denoiser)
    adapted = hidden_of(denoiser)
    assert not torch.allclose(adapted, base, atol=1e-2)
    with reference_weights(denoiser):
        assert torch.equal(hidden_of(denoiser), base)
    assert torch.equal(hidden_of(denoiser), adapted)
    trained = [name for name, p in denoiser.module.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * NUM_TARGETS * 2 and all("lora_" in name for name in trained)


@pytest.mark.parametrize("family", ALL)
def test_every_name_of_the_table_reaches_its_layers(make, family):
    for name, suffix in family_named(family).lora_targets.items():
        denoiser = make(family)
        assert add_lora(denoiser, rank=2, alpha=2, targets=[name], seed=0) == 2
        adapted = {n.split(".lora_A")[0] for n, _ in denoiser.module.named_parameters() if "lora_A" in n}
        assert adapted == {f"model.layers.{i}.{suffix}" for i in range(2)}


@pytest.mark.parametrize("family", ALL)
def test_saving_merges_without_touching_the_live_model(make, tokenizer, tmp_path, family, hidden_of, train_a_little):
    denoiser = make(family, dtype=torch.float64)
    add_lora(denoiser, rank=3, alpha=6, seed=0)
    train_a_little(denoiser)
    adapted = hidden_of(denoiser)
    save_denoiser(denoiser, tokenizer, tmp_path / "merged")
    assert torch.equal(hidden_of(denoiser), adapted)
    assert denoiser.adapter is not None
    merged, _ = load_denoiser(tmp_path / "merged", dtype=torch.float64)
    assert (hidden_of(merged) - adapted).abs().max() < 1e-10
    plain = dict(make(family).module.named_parameters())
    assert {name for name, _ in merged_weights(denoiser)} == set(plain)


@pytest.mark.parametrize("family", ALL)
def test_adapter_files_carry_the_original_names_and_load_again(make, tmp_path, family, hidden_of, train_a_little):
    denoiser = make(family)
    add_lora(denoiser, rank=3, alpha=6, targets=list(family_named(family).lora_targets)[-1:], seed=0)
    train_a_little(denoiser)
    save_adapter(denoiser, tmp_path)
    names = set(load_file(tmp_path / "adapter_model.safetensors"))
    layer = "model.transformer.blocks.1.ff_out" if family == "llada" else "model.layers.1.mlp.down_proj"
    assert f"base_model.model.{layer}.lora_A.weight" in names and len(names) == 4
    fresh = make(family)
    assert load_adapter(fresh, tmp_path) == 2
    assert torch.equal(hidden_of(fresh), hidden_of(denoiser))
    assert {"lora_" in name for name, p in fresh.module.named_parameters() if p.requires_grad} == {True}
    assert load_adapter(fresh, tmp_path) == 2  # resuming into the adapter in use
    # peft reads target_modules as one pattern over whole module names: the output head must not match it
    pattern = json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]
    originals = {denoiser.family.to_original_name(name) for name, _ in make(family).module.named_modules()}
    matched = {name for name in originals if re.fullmatch(pattern, name)}
    assert matched == {layer.replace(".1.", f".{i}.") for i in (0, 1)}


def test_initial_weights_depend_on_the_seed_alone(make):
    def first(seed):
        denoiser = make("tiny")
        before = torch.get_rng_state()
        add_lora(denoiser, rank=3, alpha=6, seed=seed)
        assert torch.equal(before, torch.get_rng_state())
        return next(p for name, p in denoiser.module.named_parameters() if "lora_A" in name)

    assert torch.equal(first(1), first(1))
    assert not torch.equal(first(1), first(2))
    assert 0 < first(1).abs().max() <= 24**-0.5


def test_dropout_acts_in_training_mode_only(make, hidden_of, train_a_little):
    denoiser = make("tiny")
    add_lora(denoiser, rank=3, alpha=6, dropout=0.5, seed=0)
    train_a_little(denoiser)
    assert not denoiser.module.training
    assert torch.equal(hidden_of(denoiser), hidden_of(denoiser))
    denoiser.module.train()
    assert not torch.equal(hidden_of(denoiser), hidden_of(denoiser))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": ["q_proj", "o_proj"]}, "'o_proj' matches no module of family 'llada'; available: .*attn_out"),
        ({"targets": []}, "targets is empty"),
        ({"rank": 0}, "rank = 0 must be >= 1"),
        ({"alpha": 0}, "alpha = 0 > 0"),
        ({"dropout": 1.0}, "dropout = 1.0 in"),
    ],
)
def test_bad_options_are_refused(make, options, message):
    denoiser = make("llada")
    with pytest.raises(ValueError, match=message):
        add_lora(denoiser, **({"rank": 2, "alpha": 4, "seed": 0} | options))
    assert denoiser.adapter is None


def test_reference_and_saving_need_an_adapter_and_there_is_only_one(make, tmp_path):
    denoiser = make("tiny")
    with pytest.raises(ValueError, match="no adapter"), reference_weights(denoiser):
        pass
    with pytest.raises(ValueError, match="no adapter"):
        save_adapter(denoiser, tmp_path)
    add_lora(denoiser, rank=2, alpha=4, seed=0)
    with pytest.raises(ValueError, match="has an adapter already"):
        add_lora(denoiser, rank=2, alpha=4, seed=0)


def test_damaged_and_foreign_adapters_are_refused(make, tmp_path):
    denoiser = make("llada")
    add_lora(denoiser, rank=2, alpha=4, seed=0)
    file = tmp_path / "adapter_model.safetensors"

    def refused(message, target=None):
        with pytest.raises(ValueError, match=message):
            load_adapter(target or make("llada"), tmp_path)

    refused("no adapter_config.json")
    save_adapter(denoiser, tmp_path)
    other = make("llada")
    add_lora(other, rank=3, alpha=4, seed=0)
    refused("the adapter has r = 2, the one in use 3", other)
    good = load_file(file)
    save_file({name.replace("blocks.1", "blocks.9"): value for name, value in good.items()}, file)
    refused("adapter modules are not in the model, first model.layers.9")
    save_file(dict(list(good.items())[1:]), file)
    refused("1 adapter weights do not fit")
    file.write_bytes(b"x" * 100)
    refused("adapter_model.safetensors: damaged weight file")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    save_file(good, file)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    refused("not use_dora")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"init_lora_weights": "pissa"}))
    refused("not init_lora_weights = 'pissa'")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"target_parameters": ["w"]}))
    refused("not target_parameters")


# What released adapters of LLaDA say; names by suffix, not all of which exist, and ff_out is the output head too.
D1 = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj", "gate_proj"]
BLOCK = "model.transformer.blocks.{}."
FOREIGN = {
    "d1": ({"target_modules": D1}, [BLOCK + name for name in ("q_proj", "k_proj", "v_proj", "up_proj")]),
    "output head": ({"target_modules": ["ff_out"]}, [BLOCK + "ff_out", "model.transformer.ff_out"]),
    "all-linear": ({"target_modules": "all-linear"}, [BLOCK + name for name in ("q_proj", "attn_out", "ff_out")]),
    "use_rslora": ({"target_modules": ["attn_out"], "use_rslora": True}, [BLOCK + "attn_out"]),
    "patterns": (
        {
            "target_modules": r".*\.(q_proj|ff_proj)",
            "rank_pattern": {"blocks.0.q_proj": 1, "ff_proj": 3},
            "alpha_pattern": {r"blocks\.\d+\.ff_proj": 5},
        },
        [BLOCK + "q_proj", BLOCK + "ff_proj"],
    ),
    "layers": (
        {"target_modules": ["q_proj"], "layers_to_transform": [0, 1], "layers_pattern": "blocks"},
        [BLOCK + "q_proj"],
    ),
}


def foreign_adapter(denoiser, settings, modules, folder, suffix):
    """Files as peft writes them for the hub's own code, and of each module (scale, B A) by hand."""
    ranks = {"model.transformer.blocks.0.q_proj": 1, **{BLOCK.format(i) + "ff_proj": 3 for i in (0, 1)}}
    state, update = {}, {}
    linear = dict(denoiser.module.named_modules())
    for name in dict.fromkeys(module.format(i) for module in modules for i in (0, 1)):
        rank = ranks.get(name, 2) if "rank_pattern" in settings else 2
        alpha = 5 if "alpha_pattern" in settings and name.endswith("ff_proj") else 8
        out, width = linear[denoiser.family.to_module_name(name)].weight.shape
        a = torch.randn(rank, width, generator=generator_for(1, name)) * 0.2
        b = torch.randn(out, rank, generator=generator_for(2, name)) * 0.2
        state |= {f"base_model.model.{name}.lora_A.weight": a, f"base_model.model.{name}.lora_B.weight": b}
        update[name] = alpha / (rank**0.5 if settings.get("use_rslora") else rank) * b @ a
    folder.mkdir()
    written = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 8,
        "lora_dropout": 0.1,
        "bias": "none",
        "inference_mode": True,
    }
    written |= {"base_model_name_or_path": "GSAI-ML/LLaDA-8B-Instruct", "task_type": "CAUSAL_LM", "unknown_key": None}
    (folder / "adapter_config.json").write_text(json.dumps(written | settings))
    if suffix == "bin":
        torch.save(state, folder / "adapter_model.bin")
    else:
        save_file(state, folder / "adapter_model.safetensors")
    return state, update


@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
@pytest.mark.parametrize("kind", FOREIGN)
def test_foreign_adapters_load_and_stay_as_they_are(make, tokenizer, tmp_path, kind, suffix, hidden_of):
    denoiser = make("llada", num_layers=2)
    state, update = foreign_adapter(denoiser, *FOREIGN[kind], tmp_path / "foreign", suffix)
    plain = {denoiser.family.to_original_name(name): p.clone() for name, p in denoiser.module.named_parameters()}
    assert load_adapter(denoiser, tmp_path / "foreign") == len(update)

    save_denoiser(denoiser, tokenizer, tmp_path / "merged")  # what it computes: W + scale * B A, and W elsewhere
    merged = load_file(tmp_path / "merged/model.safetensors")
    for name, value in plain.items():
        want = value + update.get(name.removesuffix(".weight"), torch.zeros(1))
        torch.testing.assert_close(merged[name], want, rtol=0, atol=1e-6)
    again, _ = load_denoiser(tmp_path / "merged")
    states = hidden_of(denoiser)
    torch.testing.assert_close(hidden_of(again), states, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(again.unembed(states[0]), denoiser.unembed(states[0]), rtol=1e-4, atol=1e-4)

    save_adapter(denoiser, tmp_path / "saved")
    saved = load_file(tmp_path / "saved/adapter_model.safetensors")
    assert saved.keys() == state.keys() and all(torch.equal(saved[name], state[name]) for name in state)
    settings = [(tmp_path / name / "adapter_config.json").read_bytes() for name in ("foreign", "saved")]
    assert settings[0] == settings[1]
    assert load_adapter(denoiser, tmp_path / "saved") == len(update)  # as a resumed run does


def test_an_adapter_of_a_shared_output_head_is_refused(make, tmp_path):
    foreign_adapter(make("llada", num_layers=2), *FOREIGN["output head"], tmp_path / "foreign", "bin")
    with pytest.raises(ValueError, match="an adapter of the output head, which this model shares with its embedding"):
        load_adapter(make("llada", num_layers=2, tie_embeddings=True), tmp_path / "foreign")


def test_an_adapter_of_another_scale_is_not_loaded_into_the_one_in_use(make, tmp_path):
    denoiser = make("llada", num_layers=2)
    foreign_adapter(denoiser, *FOREIGN["use_rslora"], tmp_path / "foreign", "bin")
    add_lora(denoiser, rank=2, alpha=8, targets=["attn_out"], seed=0)
    with pytest.raises(ValueError, match="the adapter has use_rslora = True, the one in use False"):
        load_adapter(denoiser, tmp_path / "foreign")
