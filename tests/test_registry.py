"""Plugins of files: found beside the configuration, in every process, and refused in one line."""

from __future__ import annotations

import sys

import pytest
import yaml

from dllm_rl import registry
from dllm_rl.config.load import dump, load_config

CONFIG = {
    "run": {"name": "r", "steps": 1},
    "model": {"path": "m"},
    "data": {"task": "sudoku4"},
    "algorithm": "trace_rl",
    "rewards": ["mine.py:polite", "sudoku"],
}


@pytest.fixture(autouse=True)
def path_kept(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(registry, "_searched", [])
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")


def write(folder, text="def polite(prompts, completions, **columns): return [1.0]\n", name="mine.py", **changes):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(text)
    (folder / "run.yaml").write_text(yaml.safe_dump(CONFIG | changes))
    return folder / "run.yaml"


def test_a_text_alone_is_the_name_of_a_plugin(tmp_path):
    config = load_config(write(tmp_path / "a"))
    assert [r.name for r in config.rewards] == ["mine.py:polite", "sudoku"] and config.algorithm.name == "trace_rl"


def test_a_file_is_found_beside_the_configuration_and_again_from_the_run(tmp_path):
    config = load_config(write(tmp_path / "a"))
    assert registry.load("rewards", "mine.py:polite")([], []) == [1.0]
    assert config.run.plugin_path == [str(tmp_path / "a")] and sys.path[-1] == str(tmp_path / "a")
    sys.path.pop()
    registry._searched.clear()
    (tmp_path / "kept.yaml").write_text(dump(config))
    load_config(tmp_path / "kept.yaml")
    assert registry.load("rewards", "mine.py:polite")([], []) == [1.0]


def test_what_is_beside_the_configuration_goes_before_the_current_directory(tmp_path):
    here = tmp_path / "elsewhere" / "mine.py"
    here.write_text("def polite(): return 'here'\n")
    sys.path.insert(0, str(here.parent))  # as python -m does
    load_config(write(tmp_path / "a", "def polite(): return 'beside'\n"))
    assert registry.load("rewards", "mine.py:polite")() == "beside"
    (tmp_path / "a" / "mine.py").unlink()
    assert load_config(tmp_path / "a" / "run.yaml").run.plugin_path[-1] == str(here.parent)
    assert registry.load("rewards", "mine.py:polite")() == "here"


def test_files_of_one_name_are_told_apart_and_may_be_called_as_ours_are(tmp_path):
    write(tmp_path / "a", "x = 1\n", "rewards.py")
    write(tmp_path / "b", "x = 2\n", "rewards.py")
    assert [registry.load("rewards", f"{tmp_path}/{f}/rewards.py:x") for f in "ab"] == [1, 2]


def test_a_module_beside_the_configuration_is_found(tmp_path):
    load_config(write(tmp_path / "a", "x = 3\n", "mine_as_module.py", rewards=["mine_as_module:x"]))
    assert registry.load("rewards", "mine_as_module:x") == 3


def test_plugins_of_files_travel_by_pickle(tmp_path):
    import pickle

    load_config(write(tmp_path / "a", "class Thing: pass\n"))
    thing = registry.load("algorithms", "mine.py:Thing")()
    assert type(pickle.loads(pickle.dumps(thing))) is type(thing)


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        ("", "mien.py:f", "no file 'mien.py' in '.*/a', '.*/elsewhere'; nearest is 'mine.py'"),
        ("def polite(): pass", "mine.py:polit", "file 'mine.py' has no 'polit'; nearest is 'polite'"),
        ("", "mine.py", "say what in that file: 'mine.py:my_name'"),
        ("def f(:\n", "mine.py:f", r"raised SyntaxError: invalid syntax \(mine.py, line 1\)"),
        ("\nimport nowhere_at_all\n", "mine.py:f", r"raised ModuleNotFoundError: .* \(.*/a/mine.py, line 2\)"),
        ("x = 1\ny = 1 / 0\n", "mine.py:f", r"raised ZeroDivisionError: .* \(.*/a/mine.py, line 2\)"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(tmp_path, text, name, message):
    load_config(write(tmp_path / "a", text))
    with pytest.raises(ValueError, match=message) as caught:
        registry.load("rewards", name)
    assert "\n" not in str(caught.value)
