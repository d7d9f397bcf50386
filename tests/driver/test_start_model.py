"""SFT with an adapter, then RL on top of it or on the sum; what model.path may be."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch

from dllm_rl.config.load import validate
from dllm_rl.driver.start_model import model_folder, with_start_model
from dllm_rl.errors import UserError
from dllm_rl.learner.model_scorer import ModelScorer
from dllm_rl.models.from_config import load_model
from dllm_rl.models.loading import load_denoiser
from dllm_rl.models.lora import load_adapter, merged_weights, reference_weights
from dllm_rl.train import train

TASK = {"name": "sudoku4", "train_puzzles": 8, "test_puzzles": 4, "min_holes": 4, "max_holes": 6}
COMMON = {
    "data": {"task": TASK, "prompts_per_step": 4, "samples_per_prompt": 4},
    "sampling": {"max_new_tokens": 16, "tokens_per_step": 8},
    "rewards": [{"name": "sudoku", "mode": "cells"}],
    "learner": {"lr": 0.01},
    "evaluate": {"at_start": False, "at_end": False},
    "diagnostics": {"every_steps": None},
}


def configuration(folder, name, model, algorithm, steps=1):
    run = {"name": name, "steps": steps, "output": str(folder), "threads": 1}
    return validate(copy.deepcopy(COMMON) | {"run": run, "model": model, "algorithm": {"name": algorithm}})


@pytest.fixture(scope="module")
def sft(tmp_path_factory):
    """The run folder of a supervised run that trained an adapter."""
    folder = tmp_path_factory.mktemp("sft")
    init = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "max_length": 48}
    model = {"family": "tiny", "init": init, "lora": {"rank": 2, "alpha": 4.0}}
    return train(configuration(folder, "sft", model, "masked_sft")).folder


def weights(model):
    return {name: value.clone() for name, value in merged_weights(model)}


def started(sft, tmp_path, **model):
    config = with_start_model(configuration(tmp_path, "rl", {"path": str(sft), **model}, "diffu_grpo"), tmp_path / "rl")
    return config, load_model(config, config.model.path)


def test_a_run_a_checkpoint_and_its_model_are_one_model(sft):
    newest = sft / "checkpoints" / "step-000001"
    for path in (sft, newest, newest / "model"):
        assert model_folder(path) == str(newest / "model")
    assert model_folder("owner/name") == "owner/name"


def test_training_goes_on_with_the_adapter_and_its_start_is_the_reference(sft, tmp_path):
    config, (model, tokenizer) = started(sft, tmp_path)
    assert config.model.lora.rank == 2 and config.model.lora.alpha == 4
    direct, _ = load_denoiser(sft / "initial")
    base = weights(direct)
    load_adapter(direct, sft / "checkpoints/step-000001/model")
    trained = weights(direct)
    assert all(torch.equal(value, trained[name]) for name, value in weights(model).items())
    assert any(not torch.equal(value, base[name]) for name, value in trained.items())
    scorer = ModelScorer(model, tokenizer, 512, reference=config.learner.reference, seed=0)
    tokens = torch.arange(12)[None] % model.vocab_size
    sees = (tokens, tokens % 2 == 1, torch.ones_like(tokens, dtype=torch.bool))
    with torch.no_grad():
        before = model.hidden_states(*sees)
        for _, parameter in scorer.trained:
            parameter.add_(0.5)
        after = model.hidden_states(*sees)
        with reference_weights(model):
            reference = model.hidden_states(*sees)
    assert torch.equal(reference, before) and not torch.allclose(after, before, atol=1e-3)


def test_a_new_adapter_starts_on_the_sum(sft, tmp_path):
    config, (model, _) = started(sft, tmp_path, merge_adapter=True, lora={"rank": 3})
    whole, _ = load_denoiser(tmp_path / "rl" / "initial")
    direct, _ = load_denoiser(sft / "initial")
    load_adapter(direct, sft / "checkpoints/step-000001/model")
    trained = weights(direct)
    for found in (weights(whole), weights(model)):
        assert all(torch.equal(value, trained[name]) for name, value in found.items())
    assert config.model.path == str(tmp_path / "rl" / "initial") and config.model.lora.rank == 3
    assert {p.name for p in (tmp_path / "rl").iterdir()} == {"initial"}


@pytest.mark.parametrize("merge", [False, True])
def test_rl_on_top_of_sft_runs_and_resumes(sft, tmp_path, merge):
    def config(steps):
        model = {"path": str(sft), "merge_adapter": merge} | ({"lora": {"rank": 3}} if merge else {})
        return configuration(tmp_path, "rl", model, "diffu_grpo", steps)

    folder = train(config(1)).folder
    settings = json.loads((folder / "checkpoints/step-000001/model/adapter_config.json").read_text())
    base = (folder if merge else sft) / "initial"
    assert settings["base_model_name_or_path"] == str(base) and settings["r"] == (3 if merge else 2)
    assert train(config(2), resume=True).steps == 2


def test_paths_that_cannot_be_used_are_named_in_one_line(sft, tmp_path, tiny_denoiser):
    adapter = sft / "checkpoints/step-000001/model"
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match="has no checkpoint yet"):
        model_folder(tmp_path / "empty")
    damaged = shutil.copytree(sft / "checkpoints/step-000001", tmp_path / "damaged")
    (damaged / "model" / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"damaged: model/adapter_config\.json has changed"):
        model_folder(damaged)
    with pytest.raises(UserError, match=r"model\.lora\.rank = 8: the adapter .* has 2"):
        started(sft, tmp_path, lora={"rank": 8})
    with pytest.raises(UserError, match=r"model\.merge_adapter: .* holds no adapter"):
        started(sft / "initial", tmp_path, merge_adapter=True)
    lost = shutil.copytree(adapter, tmp_path / "lost")
    settings = json.loads((lost / "adapter_config.json").read_text())
    for base, words in ((str(tmp_path / "gone"), "its base model .* is not there"), (None, "which model it is for")):
        (lost / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": base}))
        with pytest.raises(UserError, match=words):
            started(lost, tmp_path)
    with pytest.raises(UserError, match="is it of another family than 'llada'"):
        load_adapter(tiny_denoiser("llada"), adapter)


def test_a_run_folder_can_move(sft, tmp_path):
    moved = Path(shutil.copytree(sft, tmp_path / "moved"))
    settings = moved / "checkpoints/step-000001/model/adapter_config.json"
    settings.write_text(settings.read_text().replace(str(sft), "elsewhere"))
    model, _ = load_model(configuration(tmp_path, "x", {"path": "x"}, "diffu_grpo"), str(settings.parent))
    assert model.source == str(moved / "initial")
