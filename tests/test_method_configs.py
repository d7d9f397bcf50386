"""The tiny configuration of every method takes its steps; the recipe for length-aligned SFT keeps what fits."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from dllm_rl.config.load import load_config
from dllm_rl.models.tokenizers import character_tokenizer
from dllm_rl.train import train

ROOT = Path(__file__).resolve().parents[1]
TINY = sorted((ROOT / "configs" / "methods").glob("*_tiny.yaml"))
SMALL = [
    "run.steps=2",
    'model={"family": "tiny", "init": {"hidden_size": 32, "num_layers": 1, "num_heads": 4, "max_length": 40}}',
    "data.prompts_per_step=2",
    "data.task.train_puzzles=16",
    "data.task.test_puzzles=4",
]


@pytest.mark.parametrize("path", TINY, ids=lambda p: p.stem)
def test_tiny_configurations_run(path, tmp_path):
    changes = [*SMALL, f"run.output={tmp_path}"]
    if load_config(path).model.teacher is not None:  # which SMALL leaves out
        folder = train(load_config(path.parent / "masked_sft_tiny.yaml", changes)).folder
        changes.append(f"model.teacher.path={next(folder.glob('checkpoints/*/model'))}")
    config = load_config(path, changes)
    assert config.run.name.endswith("-tiny")
    summary = train(config)
    assert summary.steps == 2 and summary.after


@pytest.fixture(scope="module")
def recipe():
    spec = importlib.util.spec_from_file_location("length_aligned", ROOT / "scripts/recipes/length_aligned.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_length_aligned_keeps_what_fits(recipe, tmp_path, capsys):
    character_tokenizer("0123456789").save_pretrained(tmp_path / "tokenizer")
    rows = [{"prompt": "p", "completion": "1" * n, "id": n} for n in (1, 3, 4, 5, 9)]
    source, target, rest = tmp_path / "in.jsonl", tmp_path / "out.jsonl", tmp_path / "rest.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--tokenizer", str(tmp_path / "tokenizer"), "--max-tokens", "5", "--min-tokens", "3"]
    assert recipe.main([str(source), str(target), *options, "--rejected", str(rest)]) == 0
    assert [json.loads(line) for line in target.read_text().splitlines()] == rows[1:3], "3 or 4 characters and an end"
    assert [json.loads(line)["id"] for line in rest.read_text().splitlines()] == [1, 5, 9]
    assert "2 of 5 rows have 3 to 5 tokens" in capsys.readouterr().out


def test_length_aligned_refuses_rows_without_the_column(recipe, tmp_path, capsys):
    source = tmp_path / "in.jsonl"
    source.write_text('{"prompt": "p"}\n')
    arguments = [str(source), str(tmp_path / "out.jsonl"), "--tokenizer", "x", "--max-tokens", "5"]
    assert recipe.main(arguments) == 2
    assert "completion" in capsys.readouterr().err and not (tmp_path / "out.jsonl").exists()
