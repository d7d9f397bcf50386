"""Tiny models that many tests share."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: tests are tiny, threads only fight each other

import pytest
import torch

from dllm_rl.models.create import create_denoiser
from dllm_rl.models.denoiser import TransformersDenoiser
from dllm_rl.models.tokenizers import character_tokenizer

torch.set_num_threads(1)

os.environ["RAY_AUTH_MODE"] = "disabled"  # a private cluster on the loopback
os.environ["DS_ACCELERATOR"] = "cpu"


LONG_FILES = ("test_deepspeed.py", "test_submit.py", "test_signals.py", "test_learns.py", "test_plugins_installed.py")


def pytest_collection_modifyitems(items):
    """Tests that need a GPU say so where there is none; files that take long come first, not last on one processor."""
    long = {item.path for item in items if "ray_cluster" in item.fixturenames or item.path.name in LONG_FILES}
    items.sort(key=lambda item: item.path not in long)
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


FAMILIES = ("tiny", "llada", "dream", "sdar")


@pytest.fixture
def tiny_denoiser():
    """A factory of small random denoisers of any family; weights large enough that predictions differ."""

    def make(
        family: str = "tiny",
        *,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        characters: str = "0123456789 ",
        **kwargs,
    ) -> TransformersDenoiser:
        if family == "sdar":
            kwargs = {"block_size": 4} | kwargs
        denoiser = create_denoiser(
            family,
            character_tokenizer(characters),
            hidden_size=32,
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            intermediate_size=48,
            max_length=128,
            seed=seed,
            dtype=dtype,
            **kwargs,
        )
        with torch.no_grad():
            for parameter in denoiser.module.parameters():
                if parameter.dim() >= 2:
                    parameter.mul_(8)  # std 0.16: peaked predictions, so that a wrong state changes them visibly
        return denoiser

    return make


@pytest.fixture(scope="session")
def ray_cluster():
    """A private Ray cluster of this test session, with three CPUs whatever the machine has."""
    import ray

    ray.init(address="local", num_cpus=3, include_dashboard=False, namespace="tests", log_to_driver=False)
    yield
    ray.shutdown()
