"""The page docs/own_data.md: what it tells a user to type runs."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from dllm_rl.cli.main import main

PAGE = Path(__file__).parents[1] / "docs" / "own_data.md"


def test_the_page_runs_as_it_is_written(tmp_path, monkeypatch):
    text = PAGE.read_text(encoding="utf-8")
    blocks = {kind: re.findall(rf"```{kind}\n(.*?)```", text, re.DOTALL) for kind in ("python", "yaml", "bash")}
    monkeypatch.chdir(tmp_path)
    Path("my_reward.py").write_text(blocks["python"][0])
    Path("run.yaml").write_text(blocks["yaml"][-1])
    Path("rows.csv").write_text("prompt\n" + "".join(f"{n}+1=\n" for n in range(8)))
    for line in blocks["bash"][-1].splitlines():
        program, *arguments = shlex.split(line)
        assert program == "dllm-rl" and main([*arguments, "--quiet"]) == 0
    assert Path("figures.json").is_file() and Path("runs/mine/eval-step-000002.jsonl").is_file()
