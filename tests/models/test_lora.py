import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from dllm_rl import registry
from dllm_rl.models.families import family_named
from dllm_rl.models.loading import load_denoiser, save_denoiser
from dllm_rl.models.lora import add_lora, load_adapter, merged_weights, reference_weights, save_adapter

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
    refused("rank 2 and alpha 4, the one in use 3", other)
    good = load_file(file)
    save_file({name.replace("blocks.1", "blocks.9"): value for name, value in good.items()}, file)
    refused("adapter modules are not in the model, first model.layers.9")
    save_file(dict(list(good.items())[1:]), file)
    refused("1 adapter weights do not fit")
    file.write_bytes(b"x" * 100)
    refused("damaged or foreign adapter")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    save_file(good, file)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    refused("not use_dora")
