"""Configurations of tiny runs on a cluster, and places for actors."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path

import pytest

from dllm_rl.config.load import load_config

TINY = Path(__file__).resolve().parents[2] / "configs" / "tiny_sudoku_ray.yaml"


@pytest.fixture
def tiny(tmp_path):
    """The tiny cluster configuration with changes; every call has a run folder of its own."""
    made = []

    def make(*overrides: str):
        made.append(None)
        return load_config(TINY, [f"run.output={tmp_path / str(len(made))}", "run.steps=5", *overrides])

    return make


@pytest.fixture(scope="module")
def places(ray_cluster):
    """One place for a learner and two for engines, through the tests of a file."""
    with reserved() as found:
        yield found


@pytest.fixture
def more_places(ray_cluster):
    """As many beside those."""
    with reserved() as found:
        yield found


@contextmanager
def reserved():
    from dllm_rl.cluster.placement import Placement, ResourceRequest

    placement = Placement.reserve(
        ResourceRequest(count=2, cpus=0.5, gpus=0),
        ResourceRequest(count=1, cpus=0.5, gpus=0),
        colocate=False,
        wait_s=30,
        log=print,
    )
    try:
        yield placement
    finally:
        placement.close()
