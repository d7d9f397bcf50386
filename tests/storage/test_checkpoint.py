"""Checkpoints are complete or absent; damage is refused by name."""

from __future__ import annotations

import json

import pytest

from dllm_rl.storage import checkpoint


def fill_with(text):
    def fill(folder):
        (folder / "model").mkdir()
        (folder / "model" / "weights").write_text(text)

    return fill


@pytest.fixture
def root(tmp_path):
    for step in (1, 2, 3):
        checkpoint.write(tmp_path / "checkpoints", step, {"tokens": step * 10}, fill_with(f"w{step}"), keep=2)
    return tmp_path / "checkpoints"


def test_keeps_the_newest_and_finds_them(root):
    assert checkpoint.names(root) == ["step-000002", "step-000003"]
    assert checkpoint.find(root, None).name == "step-000003"
    assert checkpoint.find(root, "step-000002").name == "step-000002"
    assert checkpoint.state(root / "step-000003") == {"step": 3, "tokens": 30}


def test_a_killed_write_leaves_the_old_checkpoints_alone(root):
    def killed(folder):
        (folder / "half").write_text("x")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checkpoint.write(root, 4, {}, killed, keep=2)
    assert checkpoint.names(root) == ["step-000002", "step-000003"]
    assert checkpoint.find(root, None).name == "step-000003"
    checkpoint.write(root, 4, {}, fill_with("w4"), keep=2)  # the remains are swept away
    assert sorted(p.name for p in root.iterdir()) == ["step-000003", "step-000004"]
    assert not (root / "step-000004" / "half").exists()


def test_the_same_step_again_replaces(root):
    checkpoint.write(root, 3, {}, fill_with("new"), keep=2)
    assert (checkpoint.find(root, None) / "model" / "weights").read_text() == "new"


def edit(path):
    (path / "model" / "weights").write_text("w?")


def truncate(path):
    (path / "model" / "weights").write_text("")


def remove(path):
    (path / "state.json").unlink()


def forget(path):
    (path / "manifest.json").unlink()


def garble(path):
    (path / "manifest.json").write_text("{")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (edit, "model/weights has changed"),
        (truncate, "model/weights has changed"),
        (remove, "state.json is missing"),
        (forget, "manifest.json is missing"),
        (garble, "manifest.json is not JSON"),
    ],
)
def test_damage_is_refused_by_name_and_the_previous_one_is_only_offered(root, damage, words):
    damage(root / "step-000003")
    with pytest.raises(ValueError) as caught:
        checkpoint.find(root, None)
    assert words in str(caught.value) and "--from step-000002" in str(caught.value)
    assert checkpoint.find(root, "step-000002").name == "step-000002"


def test_unknown_and_absent_checkpoints(root, tmp_path):
    with pytest.raises(ValueError, match="there are step-000002, step-000003"):
        checkpoint.find(root, "step-000009")
    with pytest.raises(ValueError, match="no checkpoint in"):
        checkpoint.find(tmp_path / "nothing", None)


def test_manifest_lists_every_file(root):
    manifest = json.loads((root / "step-000003" / "manifest.json").read_text())
    assert sorted(manifest) == ["model/weights", "state.json"]
