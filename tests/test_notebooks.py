"""The notebooks of the documentation run from top to bottom, in an empty folder."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).resolve().parents[1] / "docs" / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_cell_runs(path, tmp_path):
    cells = ["".join(c["source"]) for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
    assert len(cells) > 1
    # One namespace, that of __main__, as in a kernel: functions have no file that a reward worker could import.
    code = "import json, sys\nfor cell in json.load(sys.stdin):\n    exec(compile(cell, 'cell', 'exec'), globals())\n"
    done = subprocess.run([sys.executable, "-c", code], input=json.dumps(cells), cwd=tmp_path, text=True)
    assert done.returncode == 0, "the traceback is above"
    assert all(not c.get("outputs") for c in json.loads(path.read_text())["cells"]), "outputs would grow stale"
