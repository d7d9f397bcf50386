"""The plan against resident memory of runs: scripts/benchmark/plan_memory.py, which docs/memory.md quotes."""

from __future__ import annotations

import importlib

import pytest


@pytest.fixture(scope="module")
def benchmark(request):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(request.config.rootpath / "scripts/benchmark"))
        return importlib.import_module("plan_memory")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["full, float32, layers recomputed", "LoRA, float32", "LoRA, bfloat16, several micro-batches"],
)
def test_the_peak_is_within_15_percent_of_what_is_measured(name, benchmark, tmp_path):
    model = benchmark.make(tmp_path, name)
    device = benchmark.predicted(name, model)
    assert device.peak == pytest.approx(benchmark.measured(name, model), rel=0.15)
