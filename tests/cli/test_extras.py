"""Packages that only some runs need: without them, one line that names the extra, and exit code 2."""

from __future__ import annotations

import importlib.util

import pytest


@pytest.mark.parametrize(
    ("package", "changes", "words"),
    [
        ("ray", {"cluster.kind": "ray"}, ["cluster.kind: ray needs ray", "pip install 'dllm-rl[ray]'"]),
        ("deepspeed", {"learner.backend": "deepspeed"}, ["learner.backend: deepspeed needs", "dllm-rl[deepspeed]"]),
        ("wandb", {"tracking.to": ["wandb"]}, ["tracking.to: wandb needs wandb", "dllm-rl[wandb]"]),
    ],
)
def test_what_is_missing_is_named(monkeypatch, write, refuse, package, changes, words):
    original = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == package else original(name, *a))
    refuse(["train", str(write(changes)), "--quiet"], words)


def test_submit_without_ray(monkeypatch, write, refuse):
    original = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "ray" else original(name, *a))
    refuse(["submit", str(write({}))], ["dllm-rl submit needs ray", "dllm-rl[ray]"])
