"""Bad input: exit code 2, one line that says what is wrong and how to go on, and nothing is lost."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dllm_rl.cli.main import main


def rows(path: Path, *lines: Any) -> str:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return str(path)


def jsonl(path: str, **more: Any) -> dict[str, Any]:
    """Changes that train on the user's own rows with a reward that any text gets."""
    return {
        "data.task": {"name": "jsonl", "train_file": path, "success": "format"},
        "model.init.tokenizer": "byte_bpe",
        "model.init.vocab_size": 300,
        "model.init.max_length": 64,
        "rewards": [{"name": "format", "pattern": "."}],
        **more,
    }


# name: (changes of the configuration, or a function of tmp_path that makes the files they need and returns them;
#        words of the message)
CONFIGURATIONS: dict[str, tuple[dict[str, Any] | Callable[[Path], dict[str, Any]], list[str]]] = {
    "unknown key": ({"learner.lrr": 1.0}, ["learner.lrr", "nearest is 'learner.lr'"]),
    "unknown section": ({"lerner.lr": 1.0}, ["lerner", "learner"]),
    "wrong type": ({"run.steps": "many"}, ["run.steps", "'many'", "integer"]),
    "out of range": ({"learner.lr": -1.0}, ["learner.lr", "-1.0", "greater than 0"]),
    "missing key": ({"algorithm": {}}, ["missing key 'algorithm.name'"]),
    "no model": ({"model": {"family": "tiny"}}, ["model.path", "model.init"]),
    "two models": ({"model.path": "x"}, ["exactly one of model.path", "model.init"]),
    "unknown algorithm": ({"algorithm.name": "trace_lr"}, ["unknown algorithm 'trace_lr'", "nearest is 'trace_rl'"]),
    "unknown engine": ({"engine.name": "nativ"}, ["unknown engine 'nativ'", "'native'"]),
    "unknown strategy": ({"sampling.strategy": {"name": "entrpy"}}, ["unknown strategy 'entrpy'", "'entropy'"]),
    "unknown reward": ({"rewards": [{"name": "sudoko"}]}, ["unknown reward 'sudoko'", "'sudoku'"]),
    "unknown task": ({"data.task": {"name": "sudoku9"}}, ["unknown task 'sudoku9'", "'sudoku4'"]),
    "unknown option of a plugin": ({"algorithm.epsilonn": 1.0}, ["algorithm.epsilonn", "nearest", "epsilon"]),
    "option of a plugin out of range": ({"algorithm.epsilon": -0.1}, ["algorithm.epsilon = -0.1", "must be > 0"]),
    "option of the wrong type": ({"algorithm.epsilon": "big"}, ["algorithm.epsilon = 'big'", "a valid number"]),
    "plugin path without a module": ({"algorithm.name": "no.such:Thing"}, ["no.such:Thing", "no module 'no'"]),
    "plugin path without the name": (
        {"algorithm.name": "algorithms.trace_rl:TraceLR"},
        ["has no 'TraceLR'", "nearest is 'TraceRL'"],
    ),
    "reward listed twice": ({"rewards": [{"name": "sudoku"}, {"name": "sudoku"}]}, ["'sudoku' is listed twice"]),
    "missing data file": (jsonl("/nowhere/train.jsonl"), ["no data file '/nowhere/train.jsonl'"]),
    "data file of another kind": (
        lambda tmp: jsonl(rows(tmp / "train.parquet", "x")),
        ["train.parquet", "cannot read this kind of file", ".jsonl"],
    ),
    "empty data set": (lambda tmp: jsonl(rows(tmp / "empty.jsonl")), ["empty.jsonl", "holds no rows"]),
    "row that is not JSON": (
        lambda tmp: jsonl(rows(tmp / "a.jsonl", {"prompt": "a"}, "{'prompt': 'b'}")),
        ["a.jsonl, line 2", "not valid JSON"],
    ),
    "row without its column": (
        lambda tmp: jsonl(rows(tmp / "a.jsonl", {"prompt": "a"}, {"prompt": "a"}, {"promt": "b"})),
        ["a.jsonl, line 3", "no column 'prompt'", "promt"],
    ),
    "prompt longer than the model": (
        lambda tmp: jsonl(
            rows(tmp / "a.jsonl", {"prompt": "a", "answer": "x"}, {"prompt": "7913 " * 9, "answer": "x"}),
            **{"model.init.max_length": 20},
        ),
        ["a.jsonl-1", "tokens", "4 are allowed"],
    ),
    "canvas longer than the model": (
        {"sampling.max_new_tokens": 40},
        ["sampling.max_new_tokens = 40", "no room for a prompt", "40 tokens"],
    ),
    "supervised training without completions": (
        lambda tmp: jsonl(
            rows(tmp / "a.jsonl", {"prompt": "a", "answer": "x"}), **{"algorithm": {"name": "masked_sft"}}
        ),
        ["a.jsonl-0", "no completion to train on"],
    ),
    "completion longer than the canvas": (
        {"algorithm": {"name": "masked_sft"}, "sampling.max_new_tokens": 8},
        ["sudoku4-", "its completion has 16 tokens, sampling.max_new_tokens is 8"],
    ),
    "reward that contradicts the data": (
        lambda tmp: jsonl(
            rows(tmp / "a.jsonl", {"prompt": "a", "answer": "x"}), rewards=[{"name": "format", "pattern": "^z"}]
        ),
        ["reward self-test", "gold completion", "a.jsonl-0", "scored 0 in 'format'"],
    ),
    "decoding blocks that do not divide the canvas": (
        {"sampling.block_size": 5},
        ["sampling.block_size = 5", "sampling.max_new_tokens = 16"],
    ),
    "decoding blocks of another size than the model's": (
        {"model.family": "sdar", "model.block_size": 4, "sampling.block_size": 8},
        ["sampling.block_size = 8", "blocks of 4"],
    ),
    "steps that do not divide over the model's blocks": (
        {"model.family": "sdar", "model.block_size": 4, "sampling.steps": 6, "sampling.tokens_per_step": 1},
        ["sampling.steps = 6 do not divide over 16 tokens in blocks of 4"],
    ),
    "guidance of a block-causal model": (
        {"model.family": "sdar", "model.block_size": 4, "sampling.cfg_scale": 1.5},
        ["sampling.cfg_scale = 1.5", "set sampling.cfg_scale to 0"],
    ),
    "block family without a block size": ({"model.family": "sdar"}, ["block_size", "sdar"]),
    "LoRA name that matches nothing": (
        {"model.lora": {"rank": 2, "targets": ["q_proj", "qq_proj"]}},
        ["qq_proj", "q_proj"],
    ),
    "unknown family": ({"model.family": "llama"}, ["llama", "llada"]),
    "init without a family": ({"model.family": None}, ["model.init needs model.family"]),
    "heads that do not divide the width": (
        {"model.init.num_heads": 5},
        ["hidden_size = 32", "num_heads = 5"],
    ),
    "greedy rollouts": ({"sampling.temperature": 0.0}, ["sampling.temperature = 0", "every advantage 0"]),
    "a group of one": ({"data.samples_per_prompt": 1}, ["data.samples_per_prompt = 1", "at least 2"]),
    "no rewards": (
        lambda tmp: jsonl(
            rows(tmp / "a.jsonl", {"prompt": "a", "answer": "x"}),
            **{"data.task": {"name": "jsonl", "train_file": str(tmp / "a.jsonl")}, "rewards": None},
        ),
        ["no rewards of its own", "rewards:"],
    ),
    "device that is not there": ({"model.device": "cuda:7"}, ["model.device", "cuda:7"]),
    "device that does not exist": ({"model.device": "gpu"}, ["model.device", "gpu"]),
    "unknown data type": ({"model.dtype": "float16"}, ["model.dtype", "bfloat16"]),
    "model folder that is missing": (
        {"model": {"path": "/nowhere/model", "family": "tiny"}},
        ["/nowhere/model"],
    ),
}


@pytest.mark.parametrize("case", CONFIGURATIONS)
def test_configurations(case, write, tmp_path, refuse):
    changes, words = CONFIGURATIONS[case]
    config = write(changes(tmp_path) if callable(changes) else changes)
    refuse(["train", str(config), "--quiet"], words)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("run: {name: [", ["config.yaml", "line"]),
        ("- a\n- b\n", ["config.yaml", "holds list", "sections such as"]),
        ("", ["config.yaml"]),
        ("extends: missing.yaml\n", ["missing.yaml"]),
        ("extends: config.yaml\n", ["config.yaml", "extends"]),
    ],
    ids=["not YAML", "a list", "empty", "extends nothing", "extends itself"],
)
def test_files(text, words, tmp_path, refuse):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    refuse(["train", str(path)], words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["learner.lr"], ["override 'learner.lr'", "section.key=value"]),
        (["learner.lrr=1"], ["learner.lrr", "nearest is 'learner.lr'"]),
        (["rewards.7.weight=1"], ["rewards", "7"]),
        (["--json", "/no/such/folder/x.json"], ["/no/such/folder", "does not exist"]),
        (["--bogus"], ["No such option", "--bogus"]),
        (["--from", "step-000007", "--quiet"], ["no checkpoint"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_arguments(arguments, words, write, refuse):
    refuse(["train", str(write()), *arguments], words)


def digest(folder: Path) -> str:
    content = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        content.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return content.hexdigest()


def edit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


LAST = "checkpoints/step-000002"
# name: (what happens to a copy of a finished run, further arguments, words)
RUNS: dict[str, tuple[Callable[[Path], Any], list[str], list[str]]] = {
    "run that exists": (lambda run: None, [], ["holds a run already", "--resume"]),
    "edited weights": (
        lambda run: edit(run / LAST / "model/model.safetensors"),
        ["--resume"],
        ["step-000002", "is damaged", "model.safetensors", "--from step-000001"],
    ),
    "truncated optimiser state": (
        lambda run: os.truncate(run / LAST / "optimizer.pt", 100),
        ["--resume"],
        ["step-000002", "is damaged", "optimizer.pt"],
    ),
    "missing file": (
        lambda run: (run / LAST / "optimizer.pt").unlink(),
        ["--resume"],
        ["step-000002", "is damaged", "optimizer.pt"],
    ),
    "unknown checkpoint": (lambda run: None, ["--from", "step-000009"], ["no checkpoint 'step-000009'", "step-000002"]),
    "checkpoint of another model": (
        lambda run: None,
        ["--resume", "run.steps=3", "model.init.hidden_size=64"],
        ["model.init.hidden_size 32 -> 64", "run.name"],
    ),
}


@pytest.mark.parametrize("case", RUNS)
def test_runs_are_kept(case, finished_run, write, tmp_path, refuse):
    spoil, arguments, words = RUNS[case]
    run = tmp_path / "runs" / "run"
    shutil.copytree(finished_run, run)
    spoil(run)
    before = digest(run)
    refuse(["train", str(write()), *arguments, "--quiet"], words)
    assert digest(run) == before, "a refused command changed the run"


def without(folder: Path, name: str) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    del weights[next(key for key in sorted(weights) if name in key)]
    save_file(weights, path, {"format": "pt"})


def with_more(folder: Path) -> None:
    path = folder / "model.safetensors"
    save_file(load_file(path) | {"extra.weight": torch.zeros(2)}, path, {"format": "pt"})


def rewrite(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def no_mask(folder: Path) -> None:
    for path in folder.glob("*.json"):
        values = json.loads(path.read_text())
        for key in [k for k in values if "mask" in k]:
            del values[key]
        path.write_text(json.dumps(values).replace("<mask>", "<other>"))


MODELS: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "missing weights": (lambda m: without(m, "q_proj"), ["q_proj", "missing"]),
    "left-over weights": (with_more, ["extra.weight"]),
    "corrupt weights": (lambda m: os.truncate(m / "model.safetensors", 2000), ["model.safetensors"]),
    "no weights": (lambda m: (m / "model.safetensors").unlink(), ["safetensors"]),
    "unknown family": (lambda m: rewrite(m, model_type="gpt2", architectures=["GPT2LMHeadModel"]), ["gpt2", "family"]),
    "config.json that is not JSON": (lambda m: (m / "config.json").write_text("{"), ["config.json"]),
    "no tokenizer": (
        lambda m: [p.unlink() for p in m.glob("*token*")],
        ["tokenizer"],
    ),
    "no mask token": (no_mask, ["mask"]),
}


@pytest.mark.parametrize("case", MODELS)
def test_models(case, finished_run, write, tmp_path, refuse):
    spoil, words = MODELS[case]
    model = tmp_path / "model"
    shutil.copytree(finished_run / LAST / "model", model)
    spoil(model)
    refuse(["train", str(write({"model": {"path": str(model)}})), "--quiet"], words)


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("nowhere", ["nowhere"]),
        (".", ["not a run folder", "config.yaml"]),
    ],
)
def test_evaluation_targets(target, words, tmp_path, monkeypatch, refuse):
    monkeypatch.chdir(tmp_path)
    refuse(["eval", target, "--quiet"], words)


def test_a_folder_named_rewards_that_hides_ours_is_named(write, tmp_path):
    """In a process of its own: import paths are decided at start-up."""
    config = write()
    (tmp_path / "rewards").mkdir()
    (tmp_path / "rewards" / "__init__.py").write_text("")
    command = [sys.executable, "-c", "from dllm_rl.cli.main import entry; entry()", "train", str(config), "--quiet"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1 and "shadows dllm-rl's own package 'rewards'" in done.stderr
    assert str(tmp_path / "rewards") in done.stderr


def test_bugs_keep_their_traceback(monkeypatch, write, capsys):
    """A ValueError out of a library is no user error: exit code 1, with the traceback."""

    def broken(*args, **kwargs):
        torch.zeros(2).reshape(3)  # RuntimeError inside torch
        raise AssertionError

    monkeypatch.setattr("dllm_rl.train.build_run", broken)
    assert main(["train", str(write()), "--quiet"]) == 1
    assert "Traceback" in capsys.readouterr().err

    def library(*args, **kwargs):
        json.loads("{")  # a ValueError raised by the standard library

    monkeypatch.setattr("dllm_rl.train.build_run", library)
    assert main(["train", str(write({"run.name": "other"})), "--quiet"]) == 1
    assert "Traceback" in capsys.readouterr().err
