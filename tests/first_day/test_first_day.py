"""A user's first day, as it would be typed: own data, own reward, SFT and RL with LoRA, export, use.

user/ holds what the user has written, commands.sh what is typed in an empty folder.
"""

from __future__ import annotations

import json
import os
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dllm_rl.cli.main import main
from dllm_rl.models.loading import load_denoiser

USER = Path(__file__).parent / "user"
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def empty(tmp_path):
    """A folder with the user's files and nothing else."""
    for file in USER.iterdir():
        if file.is_file():
            shutil.copy(file, tmp_path)
    return tmp_path


def check(folder: Path, output: str) -> None:
    """What the commands have left and said."""
    first, again = (json.loads((folder / name).read_text())["evaluations"] for name in ("figures.json", "again.json"))
    for one, other in zip(first, again, strict=True):  # the export is the run: same held-out verdicts
        same = ("success", "scored", "failed", "components", "tokens_per_forward")
        assert {k: one[k] for k in same} == {k: other[k] for k in same}
        assert one["scored"] == 6 and one["failed"] == 0
    assert {"adapter_model.safetensors", "tokenizer.json", "README.md"} <= {
        p.name for p in (folder / "adapter").iterdir()
    }
    card = (folder / "adder" / "README.md").read_text()
    assert "`diffu_grpo`" in card and "my_reward.py:close" in card
    (text,) = json.loads((folder / "text.json").read_text())["completions"]
    lines = output.splitlines()
    assert json.loads(lines[-1]) == text["tokens"]  # transformers' own Llama decodes the same tokens
    seen = torch.load(folder / "seen.pt")
    model, _ = load_denoiser(folder / "adder")
    with torch.no_grad():
        hidden = model.hidden_states(seen["tokens"], seen["tokens"] == model.mask_id, seen["tokens"] >= 0)[0]
        assert (model.unembed(hidden) - seen["logits"]).abs().max() < 1e-4
    assert "7 of 7 adapted layers differ" in output and "7 of 12 tensors differ" in output
    assert any(line.strip().startswith("1 ") and "▒▒" in line for line in lines)
    with (folder / "runs/rl/metrics.jsonl").open() as file:
        rows = [json.loads(line) for line in file]
    assert [row["step"] for row in rows] == [1, 2] and all("reward/my_reward.py:close" in row for row in rows)


def test_in_one_process(empty, monkeypatch, capsys):
    monkeypatch.chdir(empty)
    output = ""
    for command in (empty / "commands.sh").read_text().splitlines():
        program, *arguments = shlex.split(command)
        if program == "dllm-rl":
            assert main(arguments) == 0, (command, capsys.readouterr().err)
        else:
            monkeypatch.setattr(sys, "argv", arguments)
            runpy.run_path(arguments[0], run_name="__main__")
        output += capsys.readouterr().out
    check(empty, output)


@pytest.mark.slow
def test_from_an_installed_wheel(empty, tmp_path_factory):
    place = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", place / "wheels", ROOT], check=True)
    (wheel,) = (place / "wheels").glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", place / "site", wheel], check=True)
    programs = os.pathsep.join([str(place / "site" / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | {"PATH": programs, "PYTHONPATH": str(place / "site")}  # without the source tree
    where = [sys.executable, "-c", "import dllm_rl; print(dllm_rl.__file__)"]
    found = subprocess.run(where, cwd=empty, env=environment, text=True, capture_output=True, check=True)
    assert Path(found.stdout.strip()).is_relative_to(place)
    typed = ["bash", "-euo", "pipefail", "commands.sh"]
    done = subprocess.run(typed, cwd=empty, env=environment, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr[-3000:]
    check(empty, done.stdout)
