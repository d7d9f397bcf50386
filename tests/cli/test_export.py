"""dllm-rl export: what it writes, what it proves, and what it refuses."""

from __future__ import annotations

import json
import shutil

import huggingface_hub
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from dllm_rl.cli.main import main
from dllm_rl.driver import export
from dllm_rl.models.loading import load_denoiser
from dllm_rl.models.lora import load_adapter


@pytest.fixture(scope="module", params=["tiny", "llada", "dream", "sdar"])
def run(request, tmp_path_factory):
    """A run of one step that trained an adapter."""
    return trained(tmp_path_factory.mktemp(request.param), family=request.param)


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("tiny"))


def trained(folder, *, family="tiny", lora=True, **changes):
    init = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "max_length": 48}
    values = {
        "run": {"name": "run", "steps": 1, "threads": 1, "output": str(folder)},
        "model": {"family": family, "init": init, "block_size": 4 if family == "sdar" else None},
        "data": {
            "task": {"name": "sudoku4", "train_puzzles": 8, "test_puzzles": 4, "min_holes": 4, "max_holes": 6},
            "prompts_per_step": 4,
        },
        "sampling": {"max_new_tokens": 16, "tokens_per_step": 8},
        "algorithm": {"name": "masked_sft"},
        "learner": {"lr": 0.05},
        "evaluate": {"at_start": False, "limit": 4},
        "diagnostics": {"every_steps": None},
    }
    values["model"] |= {"lora": {"rank": 2, "alpha": 8.0}} if lora else {}
    (folder / "config.yaml").write_text(yaml.safe_dump(values | changes))
    assert main(["train", str(folder / "config.yaml"), "--quiet"]) == 0
    return folder / "run"


def test_a_merged_export_is_the_base_with_the_adapter_in_the_familys_layout(run, tmp_path, capsys):
    out, figures = tmp_path / "out", tmp_path / "figures.json"
    assert main(["export", str(run), "--merge", str(out), "--json", str(figures)]) == 0
    assert "7 of " in capsys.readouterr().out
    proof = json.loads(figures.read_text())
    assert (proof["kind"], proof["changed"]) == ("merged", 7)
    assert proof["effect"] > 1e-2 and proof["error"] < 1e-5
    direct, _ = load_denoiser(run / "initial")
    load_adapter(direct, run / "checkpoints/step-000001/model")
    model, _ = load_denoiser(out)
    assert torch.allclose(export.probe_logits(model), export.probe_logits(direct), atol=1e-4)
    for file in (run / "initial").glob("tok*"):
        assert (out / file.name).read_bytes() == file.read_bytes()
    assert json.loads((out / "config.json").read_text()) == json.loads((run / "initial/config.json").read_text())
    assert not list(tmp_path.glob(".*"))


def test_the_model_card_says_where_it_is_from(tiny_run, tmp_path):
    out = tmp_path / "out"
    assert main(["export", str(tiny_run / "checkpoints/step-000001"), str(out)]) == 0
    card = (out / "README.md").read_text()
    _, meta, text = card.split("---\n", 2)
    assert yaml.safe_load(meta) == {"library_name": "peft", "tags": ["diffusion", "dllm-rl"]}
    for words in ("`masked_sft`", "task `sudoku4`", "steps: 1 of 1", "| eval/8_per_step/success |", "dllm-rl export"):
        assert words in text, words
    assert f"base model: `{tiny_run / 'initial'}` (a local folder)" in text and "provenance" not in text
    assert "7 of 7 adapted layers differ" in text


def test_an_adapter_is_exported_with_its_tokenizer_and_loads_on_its_base(tiny_run, tmp_path):
    out = tmp_path / "out"
    assert main(["export", str(tiny_run), str(out)]) == 0
    names = {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert {p.name for p in out.iterdir()} >= names | {"tokenizer.json"}
    assert main(["export", str(out), "--merge", str(tmp_path / "whole")]) == 0  # an adapter folder, without its run
    assert load_denoiser(tmp_path / "whole")[0].family.name == "tiny"


def test_a_model_trained_in_full_is_exported_against_its_start(tmp_path, refuse):
    folder = trained(tmp_path, lora=False)
    figures = tmp_path / "figures.json"
    assert main(["export", str(folder), str(tmp_path / "out"), "--json", str(figures)]) == 0
    proof = json.loads(figures.read_text())
    assert proof["kind"] == "full" and proof["changed"] == proof["tensors"] and proof["error"] == 0
    refuse(["export", str(folder), "--merge", str(tmp_path / "more")], ["holds no adapter"])


def test_an_export_without_effect_ends_with_1_and_leaves_nothing(tiny_run, tmp_path, capsys):
    adapter = shutil.copytree(tiny_run / "checkpoints/step-000001/model", tmp_path / "adapter")
    weights = load_file(adapter / "adapter_model.safetensors")
    zero = {name: value * (0 if ".lora_B." in name else 1) for name, value in weights.items()}
    save_file(zero, adapter / "adapter_model.safetensors")
    for merge in ([], ["--merge"]):
        assert main(["export", str(adapter), *merge, str(tmp_path / "out")]) == 1
        assert "0 of" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]


def test_an_export_that_computes_something_else_ends_with_1(tiny_run, tmp_path, capsys, monkeypatch):
    def wrong(denoiser, tokenizer, folder):  # a merge that forgets to scale the update, say
        with torch.no_grad():
            next(p for n, p in denoiser.module.named_parameters() if ".lora_B." in n).mul_(1.1)
        save(denoiser, tokenizer, folder)

    save = export.save_denoiser
    monkeypatch.setattr(export, "save_denoiser", wrong)
    assert main(["export", str(tiny_run), "--merge", str(tmp_path / "out")]) == 1
    assert "computes something else than the checkpoint" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_bfloat16_bases_stay_bfloat16(tiny_run, tmp_path):
    moved = shutil.copytree(tiny_run / "checkpoints/step-000001/model", tmp_path / "adapter")
    base = shutil.copytree(tiny_run / "initial", tmp_path / "base")
    half = {name: value.bfloat16() for name, value in load_file(base / "model.safetensors").items()}
    save_file(half, base / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((moved / "adapter_config.json").read_text()) | {"base_model_name_or_path": str(base)}
    (moved / "adapter_config.json").write_text(json.dumps(settings))
    assert main(["export", str(moved), "--merge", str(tmp_path / "out")]) == 0
    assert {v.dtype for v in load_file(tmp_path / "out/model.safetensors").values()} == {torch.bfloat16}


def test_what_cannot_be_exported_is_refused(tiny_run, tmp_path, refuse):
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("precious")
    refuse(["export", str(tiny_run), str(full)], ["is there already and not empty"])
    assert (full / "mine.txt").read_text() == "precious"
    refuse(["export", str(tiny_run / "initial"), str(tmp_path / "out")], ["neither a run, nor a checkpoint"])
    refuse(["export", str(tmp_path / "no"), str(tmp_path / "out")], ["neither a run"])
    refuse(["export", str(tiny_run), str(tmp_path / "out"), "--push-to-hub", "a/b/c"], ["write owner/name"])


def test_push_to_hub_uploads_the_folder_and_keeps_it_if_that_fails(tiny_run, tmp_path, capsys, monkeypatch):
    calls = []

    class Hub:
        def create_repo(self, name, **options):
            calls.append((name, options))

        def upload_folder(self, *, repo_id, folder_path, commit_message):
            calls.append((repo_id, sorted(p.name for p in folder_path.iterdir())))
            return f"https://hub/{repo_id}"

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    assert main(["export", str(tiny_run), str(tmp_path / "out"), "--push-to-hub", "me/mine"]) == 0
    assert "uploaded to https://hub/me/mine" in capsys.readouterr().out
    assert calls[0] == ("me/mine", {"private": True, "exist_ok": True})
    assert {"README.md", "adapter_model.safetensors"} <= set(calls[1][1])

    def offline(*arguments, **options):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(Hub, "create_repo", offline)
    assert main(["export", str(tiny_run), str(tmp_path / "again"), "--push-to-hub", "me/mine"]) == 1
    assert "was not uploaded to 'me/mine'" in capsys.readouterr().err and (tmp_path / "again/README.md").is_file()
