"""Methods of another package that need what only some need: the same bits in one process and on Ray, and they learn."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dllm_rl.reports.run_folder import comparable
from dllm_rl.train import train

LOCAL = ("cluster.kind=local", "cluster.engines=1")


def weights(folder, step):
    return load_file(next(folder.glob(f"checkpoints/step-{step:06d}/model/*.safetensors")))


@pytest.mark.parametrize(
    "method",
    ["OneExpert", "LogSum"]
    + [pytest.param(m, marks=pytest.mark.slow) for m in ("WithValues", "FreshMasks", "PerDrawAdvantages")],
)
def test_it_trains_in_one_process_and_on_ray(method, tiny, ray_cluster, tmp_path, monkeypatch):
    shutil.copy(Path(__file__).parent / "foreign" / "methods.py", tmp_path / "foreign_methods.py")
    monkeypatch.syspath_prepend(str(tmp_path))
    changes = (
        f"algorithm={{name: 'foreign_methods:{method}'}}",
        *(
            "run.steps=2",
            "checkpoint={every_steps: 1, keep: 9}",
            "evaluate.at_end=false",
            "cluster.engines=1",
            "diagnostics.every_steps=null",
        ),
        *("data.prompts_per_step=6", "learner.updates_per_step=2", "learner.value_lr=1.0e-3"),
    )
    local, cluster = (train(tiny(*changes, *place)).folder for place in (LOCAL, ()))
    assert comparable(local) == comparable(cluster)
    one, other, first = weights(local, 2), weights(cluster, 2), weights(local, 1)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert any(not torch.equal(first[name], one[name]) for name in one), "or nothing would be compared"
    rows = comparable(local)
    assert any(row["grad_norm"] > 0 for row in rows)
    if method == "OneExpert":
        assert all("guided/reward" in row for row in rows)
    if method == "WithValues":
        assert any(row["value_loss"] > 0 for row in rows)
