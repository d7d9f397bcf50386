"""Families of somebody else's package: named by entry point or place, made, trained, saved, loaded and evaluated."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from importlib import invalidate_caches
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dllm_rl import registry
from dllm_rl.config.load import load_config, validate
from dllm_rl.conformance.suite import check_plugin
from dllm_rl.driver.evaluate_target import evaluate_target
from dllm_rl.errors import UserError
from dllm_rl.models.create import create_denoiser
from dllm_rl.models.families import family_named, family_of
from dllm_rl.models.loading import load_denoiser, save_denoiser
from dllm_rl.reports.progress import Quiet
from dllm_rl.reports.run_folder import comparable
from dllm_rl.train import train

ROOT = Path(__file__).resolve().parents[2]

# Llama with names, keys and a mask token of its own; and GPT-NeoX: layer norms with biases, fused queries, keys and
# values, rotary embeddings on a part of each head, other names of backbone, embeddings and head; block-causal.
PACKAGE = '''
from transformers import GPTNeoXForCausalLM, LlamaForCausalLM

from dllm_rl.models.family import Family, require

TARGETS = {"query": "self_attn.q_proj", "value": "self_attn.v_proj", "down": "mlp.down_proj"}
OTHERS = {
    "key": "self_attn.k_proj",
    "out": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "norm_1": "input_layernorm",
    "norm_2": "post_attention_layernorm",
}


def zebra_options(config):
    require(config, "zebra", {"stripes": (True, True)})
    return {
        "vocab_size": config["tokens"],
        "hidden_size": config["width"],
        "intermediate_size": config["inner_width"],
        "num_hidden_layers": config["depth"],
        "num_attention_heads": config["heads"],
        "num_key_value_heads": config["kv_heads"],
        "max_position_embeddings": config["context"],
        "tie_word_embeddings": config["tied"],
        "rms_norm_eps": config["eps"],
    }


def zebra_config(shared):
    return {
        "architectures": ["ZebraLM"],
        "model_type": "zebra",
        "stripes": True,
        "tokens": shared["vocab_size"],
        "width": shared["hidden_size"],
        "inner_width": shared["intermediate_size"],
        "depth": shared["num_hidden_layers"],
        "heads": shared["num_attention_heads"],
        "kv_heads": shared["num_key_value_heads"],
        "context": shared["max_position_embeddings"],
        "tied": shared["tie_word_embeddings"],
        "eps": shared["rms_norm_eps"],
    }


ZEBRA = Family(
    name="zebra",
    model_type="zebra",
    architectures=("ZebraLM",),
    module_class=LlamaForCausalLM,
    to_transformers=zebra_options,
    new_config=zebra_config,
    max_length_key="context",
    lora_targets=TARGETS,
    names=(
        *((f"z.{{i}}.{own}", f"model.layers.{{i}}.{inner}") for own, inner in (TARGETS | OTHERS).items()),
        ("z.words", "model.embed_tokens"),
        ("z.last_norm", "model.norm"),
        ("z.logits", "lm_head"),
    ),
    mask_token="<mask>",
)

SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


class OxFamily(Family):
    """Told from other GPT-NeoX checkpoints by how it was trained."""

    def matches(self, config):
        return super().matches(config) and config.get("objective") == "masks"


def ox_options(config):
    return {
        **{key: config[key] for key in (*SIZES, "max_position_embeddings", "tie_word_embeddings")},
        "rotary_pct": 0.5,
        "layer_norm_eps": config["layer_norm_eps"],
    }


OX = OxFamily(
    name="ox",
    model_type="gpt_neox",
    module_class=GPTNeoXForCausalLM,
    to_transformers=ox_options,
    new_config=lambda shared: {
        "model_type": "gpt_neox",
        "objective": "masks",
        "layer_norm_eps": shared["rms_norm_eps"],
        **shared,
    },
    lora_targets={"query_key_value": "attention.query_key_value", "dense": "attention.dense"},
    block_causal=True,
)
'''
NAMES = ("zebra", "zoo.animals:ZEBRA", "zoo.animals:OX")  # the last one has no entry point


@pytest.fixture
def zoo(tmp_path, monkeypatch):
    """A package in a folder of its own, as a wheel leaves it, on the path of this process alone."""
    folder = tmp_path / "site"
    (folder / "zoo").mkdir(parents=True)
    (folder / "zoo" / "__init__.py").write_text("")
    (folder / "zoo" / "animals.py").write_text(PACKAGE)
    (folder / "zoo" / "habits.py").write_text(
        "from algorithms.coupled_grpo import CoupledGRPO\n"
        "from rollouts.native import NativeEngine\n"
        "from rollouts.strategies.low_confidence import LowConfidence\n\n\n"
        "class Method(CoupledGRPO):\n    pass\n\n\n"
        "class Engine(NativeEngine):\n    pass\n\n\n"
        "class Order(LowConfidence):\n    pass\n"
    )
    info = folder / "zoo-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: zoo\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[dllm_rl.families]\nzebra = zoo.animals:ZEBRA\n")
    monkeypatch.syspath_prepend(str(folder))
    invalidate_caches()
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "zoo"]:
        del sys.modules[name]


def configuration(folder, family, algorithm, lora=None):
    return {
        "run": {"name": "run", "steps": 2, "output": str(folder), "threads": 1},
        "model": {
            "family": family,
            "init": {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_length": 64},
            "block_size": 4 if family.endswith("OX") else None,
            "lora": lora,
        },
        "data": {
            "task": {"name": "sudoku4", "train_puzzles": 40, "test_puzzles": 20, "min_holes": 4, "max_holes": 6},
            "prompts_per_step": 4,
            "samples_per_prompt": 4,
        },
        "sampling": {"max_new_tokens": 16, "tokens_per_step": 4},
        "algorithm": {"name": algorithm},
        "rewards": [{"name": "format", "pattern": "^[1-4]{2}"}, {"name": "sudoku"}],  # a random model earns the first
        "learner": {"lr": 1e-3, "tokens_per_microbatch": 600},
        "evaluate": {"limit": 8, "at_start": False},
        "checkpoint": {"every_steps": 1, "keep": 9},
    }


def weights(folder, step):
    return load_file(folder / f"checkpoints/step-{step:06d}/model/model.safetensors")


@pytest.mark.parametrize("name", NAMES)
def test_it_keeps_the_contract(zoo, name):
    assert {f.check: f.problem for f in check_plugin("families", name, {}) if f.problem is not None} == {}


def test_the_documented_example_keeps_the_contract(tmp_path, monkeypatch):
    text = (ROOT / "docs" / "plugins.md").read_text()
    code = text[text.index("# my_package/families.py") :].partition("```")[0]
    (tmp_path / "heron_families.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    problems = [f.problem for f in check_plugin("families", "heron_families:HERON", {}) if f.problem is not None]
    assert problems == []


def test_entry_points_of_a_package_are_found(zoo, tokenizer, tmp_path):
    assert registry.names("families") == ["dream", "llada", "sdar", "tiny", "zebra"]
    assert family_of({"model_type": "zebra", "architectures": ["ZebraLM"]}, "x").name == "zebra"
    ox = family_named("zoo.animals:OX")
    assert ox.matches({"model_type": "gpt_neox", "objective": "masks"}) and not ox.matches({"model_type": "gpt_neox"})
    with pytest.raises(ValueError, match=r"unknown model family, model_type = 'gpt_neox'.*; zebra .zebra ZebraLM."):
        family_of({"model_type": "gpt_neox", "objective": "masks"}, "x")  # unless it is named
    made = create_denoiser("zebra", tokenizer, hidden_size=16, num_layers=1, num_heads=2, max_length=16, seed=0)
    save_denoiser(made, tokenizer, tmp_path / "saved")
    assert {"z.words.weight", "z.0.query.weight"} <= load_file(tmp_path / "saved/model.safetensors").keys()
    loaded, _ = load_denoiser(tmp_path / "saved")  # found by its config.json, the mask token by its text
    assert loaded.family is made.family and loaded.mask_id == tokenizer.mask_token_id
    config = json.loads((tmp_path / "saved/config.json").read_text()) | {"stripes": False}
    (tmp_path / "saved/config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="stripes = False is not supported for family 'zebra', only True"):
        load_denoiser(tmp_path / "saved")


@pytest.mark.parametrize("lora", [None, {"rank": 4, "alpha": 8.0}], ids=["full", "lora"])
@pytest.mark.parametrize("algorithm", ["masked_sft", "coupled_grpo"])
@pytest.mark.parametrize("name", ["zebra", "zoo.animals:OX"])
def test_it_is_trained_resumed_and_evaluated(zoo, tmp_path, name, algorithm, lora):
    values = configuration(tmp_path / "whole", name, algorithm, lora)
    folder = train(validate(values)).folder
    assert all(row["grad_norm"] > 0 for row in comparable(folder) if "grad_norm" in row)
    half = tmp_path / "half" / "run"
    shutil.copytree(folder, half)
    train(validate(values | {"run": values["run"] | {"output": str(half.parent)}}), from_checkpoint="step-000001")
    assert comparable(half) == comparable(folder)
    if lora is None:
        first, last, other = weights(folder, 1), weights(folder, 2), weights(half, 2)
        assert any(not torch.equal(first[key], last[key]) for key in first)
        assert all(torch.equal(last[key], other[key]) for key in last)
    (found,) = evaluate_target(folder, ["evaluate.limit=4"], Quiet())
    assert found.scored == 4


@pytest.mark.slow
@pytest.mark.ray
def test_actors_find_the_package_too(zoo, tmp_path, ray_cluster):
    """Its families by entry point and by place, and the other kinds of plugins: only this process was told the path."""
    changes = (
        *("model.family=zebra", "model.lora.rank=4", "engine.name=zoo.habits:Engine", "run.steps=2"),
        *("algorithm={name: 'zoo.habits:Method'}", "sampling.strategy={name: 'zoo.habits:Order'}"),
    )
    file = ROOT / "configs" / "tiny_sudoku_ray.yaml"
    alone = [f"run.output={tmp_path / 'alone'}", "cluster.kind=local", "cluster.engines=1"]
    cluster = [f"run.output={tmp_path / 'cluster'}", "model.family=zoo.animals:ZEBRA"]
    folders = [train(load_config(file, [*changes, *more])).folder for more in (alone, cluster)]
    assert comparable(folders[1]) == comparable(folders[0])
    one, other = (load_file(next(f.glob("checkpoints/step-000002/model/*.safetensors"))) for f in folders)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("clause", "value", "message"),
    [
        (
            "to_transformers",
            lambda config: config["no such key"],
            r"to_transformers\(\) raised KeyError: 'no such key'",
        ),
        ("to_transformers", lambda config: None, r"to_transformers\(\) must return a dict, returned NoneType"),
        ("new_config", lambda shared: [shared], r"new_config\(\) must return a dict, returned list"),
        ("new_config", lambda shared: shared["no_such_size"], r"new_config\(\) raised KeyError"),
    ],
)
def test_a_fault_of_a_family_is_named(zoo, clause, value, message):
    broken = dataclasses.replace(family_named("zebra"), **{clause: value})
    with pytest.raises(UserError, match=f"^model family 'zebra': {message}"):
        if clause == "new_config":
            broken.declared(clause, {})
        else:
            broken.skeleton({}, torch.float32)
