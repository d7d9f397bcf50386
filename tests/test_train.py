"""The loop end to end on the CPU: every algorithm, resume to the same bits, records and samples."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from dllm_rl import registry
from dllm_rl.config.load import validate
from dllm_rl.config.plugins import build
from dllm_rl.learner.torch_learner import NonFiniteError
from dllm_rl.reports.run_folder import comparable
from dllm_rl.tasks.sudoku import Sudoku4
from dllm_rl.train import train
from tests.methods import sections, tiny

LORA = {"rank": 4, "alpha": 8.0, "dropout": 0.1}


def configuration(folder, *, algorithm="trace_rl", steps=2, family="tiny", lora=None, name="run", **sections):
    values = {
        "run": {"name": name, "steps": steps, "output": str(folder), "threads": 1},
        "model": {
            "family": family,
            "init": {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_length": 64},
            "block_size": 4 if family == "sdar" else None,
            "lora": lora,
        },
        "data": {
            "task": {"name": "sudoku4", "train_puzzles": 40, "test_puzzles": 20, "min_holes": 4, "max_holes": 6},
            "prompts_per_step": 4,
            "samples_per_prompt": 4,
        },
        "sampling": {"max_new_tokens": 16, "tokens_per_step": 4},
        "algorithm": {"name": algorithm},
        # The random model solves no board: cells give rewards that differ within a group.
        "rewards": [{"name": "sudoku", "mode": "cells"}],
        "learner": {"lr": 1e-3, "tokens_per_microbatch": 600},
        "evaluate": {"limit": 8, "at_start": False},
    }
    for section, changes in sections.items():
        values[section] = values.get(section, {}) | changes
    return values


class Shapes(Sudoku4):
    """Sudoku whose success is a shape that a random model produces."""

    success = "format"


def run(values, **options):
    return train(validate(values), **options)


def rows(summary, name="metrics.jsonl"):
    return [json.loads(line) for line in (summary.folder / name).read_text().splitlines()]


@pytest.mark.parametrize("family", ["tiny", "dream", "sdar"])
@pytest.mark.parametrize("algorithm", sorted(registry.names("algorithms")))
def test_every_algorithm_runs_on_every_kind_of_family(tmp_path, monkeypatch, algorithm, family):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    values = configuration(tmp_path, algorithm=algorithm, family=family)
    # 16 digits are never valid from a random model: every text, an empty one too, counts as success, for methods that
    # learn from solved rows only (some of them are fast), and the reward tells the rows of a group apart.
    values["rewards"] = [{"name": "format", "pattern": "^"}, {"name": "light_rewards:apart"}]
    values["data"]["task"] = {"name": "test_train:Shapes", "train_puzzles": 40, "test_puzzles": 20}
    values["reward_pool"] = {"self_test": 0}
    for section, changes in sections(algorithm, threshold=0.15).items():
        values[section] |= changes
    # Several forwards in every block, for methods that compare a step with those after it.
    values["sampling"]["tokens_per_step"] = min(2, values["sampling"]["tokens_per_step"])
    summary = run(values)
    assert summary.steps == 2 and len(summary.after) == 1
    first, second = [row for row in rows(summary) if "loss" in row]
    assert first["grad_norm"] > 0 and second["step"] == 2 and 0 < first["kept_rows"] <= 1
    needs = build("algorithms", algorithm, tiny(algorithm).algorithm.options).needs
    folders = [f"{part if len(needs.trains) > 1 else 'model'}/{part}.safetensors" for part in needs.trains]
    weights = [f"checkpoints/step-000002/{name}" for name in folders]
    for name in ("config.yaml", "metrics.jsonl", "plot.png", *weights):
        assert (summary.folder / name).stat().st_size > 0
    if needs.source == "rollouts":
        samples = rows(summary, "samples.jsonl")
        assert len(samples) == 8 and len(samples[0]["prompt"]) == 17 and 1 <= samples[0]["num_forwards"] <= 16


@pytest.mark.parametrize("algorithm", ["trace_rl", "lightning_rl"])
def test_steps_without_one_scored_row_are_survived(tmp_path, monkeypatch, algorithm):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    values = configuration(tmp_path, algorithm=algorithm, reward_pool={"self_test": 0, "max_failure_fraction": 1})
    values["rewards"] = [{"name": "sudoku", "weight": 0.0}, {"name": "light_rewards:fails"}]
    values["evaluate"] = {"at_start": False, "at_end": False}
    summary = run(values)
    assert summary.steps == 2
    assert [row["failed_rows"] for row in rows(summary)] == [1.0, 1.0]
    assert all("loss" not in row and row["kept_rows"] == 0 for row in rows(summary))


@pytest.mark.parametrize("algorithm", ["espo", "gdpo", "coupled_grpo"])
def test_stale_rollouts_are_corrected_for_methods_of_rows_too(tmp_path, monkeypatch, algorithm):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    stale, quiet = {"max_staleness": 1, "correction": "sequence"}, {"at_end": False}
    values = configuration(tmp_path, algorithm=algorithm, steps=3, rollout=stale, evaluate=quiet)
    values["rewards"], values["reward_pool"] = [{"name": "sudoku"}, {"name": "light_rewards:apart"}], {"self_test": 0}
    summary = run(values)
    assert ["stale_ratio" in row for row in rows(summary)] == [False, True, True]
    assert all(row["grad_norm"] > 0 for row in rows(summary))


def test_lora_trains_the_adapter_alone(tmp_path):
    values = configuration(tmp_path, algorithm="diffu_grpo", lora=LORA)
    values["rewards"] = [{"name": "sudoku"}, {"name": "format", "pattern": "[12]$"}]
    summary = run(values)
    saved = {p.name for p in (summary.folder / "checkpoints/step-000002/model").iterdir()}
    assert "adapter_model.safetensors" in saved and "model.safetensors" not in saved


def test_checkpoints_keep_the_tokenizer_files_of_the_model_also_after_a_resume(tmp_path):
    source = run(configuration(tmp_path, steps=1, name="source")).folder / "initial"
    settings = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(json.dumps(settings, indent=7))  # not as transformers writes it
    (source / "special_tokens_map.json").write_text('{"eos_token": "<eos>"}')
    files = {file.name: file.read_bytes() for file in source.glob("*tok*")}
    assert len(files) == 3
    values = configuration(tmp_path, steps=1, checkpoint={"every_steps": 1}) | {
        "model": {"path": str(source), "family": "tiny"}
    }
    run(values)
    values["run"]["steps"] = 2
    folder = run(values, resume=True).folder
    for step in (1, 2):
        saved = folder / f"checkpoints/step-{step:06d}/model"
        assert {name: (saved / name).read_bytes() for name in files} == files


def test_an_existing_run_is_not_written_over(tmp_path):
    run(configuration(tmp_path))
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match="holds a run already; continue it with --resume"):
        run(configuration(tmp_path))
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_the_resolved_configuration_runs_again_to_the_same_metrics(tmp_path):
    first = run(configuration(tmp_path))
    values = yaml.safe_load((first.folder / "config.yaml").read_text())
    assert values["provenance"]["versions"]["torch"] == torch.__version__
    values["run"]["name"] = "again"
    second = run(values)
    assert [r.get("loss") for r in rows(second)] == [r.get("loss") for r in rows(first)]


def test_a_finished_run_resumes_to_nothing(tmp_path):
    first = run(configuration(tmp_path))
    before = rows(first)
    again = run(configuration(tmp_path), resume=True)
    assert again.steps == 2 and again.after == () and rows(first) == before


def test_non_finite_training_stops_and_keeps_the_batch(tmp_path):
    values = configuration(tmp_path, algorithm="masked_sft", steps=50)
    values["learner"] |= {"lr": 1e30, "max_grad_norm": None}
    with pytest.raises(NonFiniteError, match="the batch is in"):
        run(values)
    assert list((tmp_path / "run" / "dumps").glob("*.pt"))


def parameters(folder: Path, step: int) -> dict[str, bytes]:
    place = folder / "checkpoints" / f"step-{step:06d}"
    files = [p for p in (place / "model").iterdir() if p.suffix == ".safetensors"]
    optimizer = torch.load(place / "optimizer.pt", weights_only=True)["optimizer"]["adam"]["state"]
    moments = {f"{k}.{n}": v.numpy().tobytes() for k, s in optimizer.items() for n, v in s.items()}
    return {p.name: p.read_bytes() for p in files} | moments


@pytest.mark.parametrize(
    ("algorithm", "lora"), [("masked_sft", None), ("trace_rl", None), ("coupled_grpo", LORA)], ids=str
)
def test_ten_steps_equal_four_a_kill_and_six_more(tmp_path, algorithm, lora):
    def values(name):
        made = configuration(tmp_path, algorithm=algorithm, lora=lora, steps=10, name=name)
        made["checkpoint"] = {"every_steps": 2, "keep": 9}
        made["rewards"] = [{"name": "sudoku"}, {"name": "format", "pattern": "[12]$"}]
        made["learner"] |= {"updates_per_step": 2, "warmup_steps": 3}
        return made

    whole = run(values("whole"))
    (tmp_path / "killed.yaml").write_text(yaml.safe_dump(values("killed")))
    code = (
        "import sys; from dllm_rl.config.load import load_config; from dllm_rl.train import train;"
        "train(load_config(sys.argv[1]))"
    )
    folder = tmp_path / "killed"
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "killed.yaml")])
    deadline = time.monotonic() + 120
    while not (folder / "checkpoints" / "step-000004").exists():
        assert process.poll() is None and time.monotonic() < deadline, "the run ended before it could be killed"
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    reached = max(
        json.loads(line)["step"]
        for line in (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
        if line.endswith("\n")
    )
    assert 4 <= reached < 10, "killed in mid-run"
    resumed = run(values("killed"), resume=True)
    assert parameters(resumed.folder, 10) == parameters(whole.folder, 10)
    assert comparable(whole.folder) == comparable(resumed.folder)
    assert rows(whole, "samples.jsonl") == rows(resumed, "samples.jsonl")


def test_a_kill_before_the_first_checkpoint_starts_over(tmp_path):
    first = run(configuration(tmp_path))
    for path in (first.folder / "checkpoints").iterdir():
        path.rename(tmp_path / path.name)
    again = run(configuration(tmp_path), resume=True)
    assert [row["step"] for row in rows(again) if "loss" in row] == [1, 2]
