"""Values, files and plugins that cannot be: exit code 2, one line that names the key or file, no run folder.

With test_bad_inputs.py and test_bad_plans.py, every wrong input that we know of.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import yaml

from dllm_rl.cli.main import main
from dllm_rl.config.load import load_config

INF, NAN = float("inf"), float("nan")
FINITE, SECTION = "a finite number", "must be a section"

# name: (changes of the configuration, words of the message)
VALUES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "infinite temperature": ({"sampling.temperature": INF}, ["sampling.temperature = inf", FINITE]),
    "temperature that is no number": ({"sampling.temperature": NAN}, ["sampling.temperature = nan", FINITE]),
    "infinite learning rate": ({"learner.lr": INF}, ["learner.lr = inf", FINITE]),
    "NaN epsilon": ({"learner.eps": NAN}, ["learner.eps = nan", FINITE]),
    "NaN guidance": ({"sampling.cfg_scale": NAN}, ["sampling.cfg_scale = nan", FINITE]),
    "infinite option of a plugin": ({"algorithm.epsilon": INF}, ["algorithm.epsilon = inf", FINITE]),
    "NaN option of a plugin": ({"algorithm.epsilon": NAN}, ["algorithm.epsilon = nan", FINITE]),
    "infinite weight": ({"rewards": [{"name": "sudoku", "weight": INF}]}, ["rewards.0.weight = inf", FINITE]),
    "NaN weight": ({"rewards": [{"name": "sudoku", "weight": NAN}]}, ["rewards.0.weight = nan", FINITE]),
    "infinite steps": ({"run.steps": INF}, ["run.steps = inf", FINITE]),
    "a reward without time": ({"rewards": [{"name": "sudoku", "timeout_s": 0}]}, ["timeout_s = 0", "greater than 0"]),
    "a beta of 1": ({"learner.betas": [0.9, 1.0]}, ["betas = [0.9, 1.0]", "below 1"]),
    "a negative beta": ({"learner.betas": [-0.1, 0.9]}, ["betas = [-0.1, 0.9]", "at least 0"]),
    "one beta": ({"learner.betas": [0.9]}, ["learner.betas.1"]),
    "betas as text": ({"learner.betas": "0.9"}, ["learner.betas = '0.9'", "tuple"]),
    "a speed of 0": ({"evaluate.tokens_per_step": [0]}, ["evaluate.tokens_per_step.0 = 0", "equal to 1"]),
    "a speed beyond the canvas": ({"evaluate.tokens_per_step": [99]}, ["evaluate.tokens_per_step = 99", "at most 16"]),
    "a speed twice": ({"evaluate.tokens_per_step": [1, 1]}, ["evaluate.tokens_per_step lists 1 twice"]),
    "a speed that is no list": ({"evaluate.tokens_per_step": 4}, ["evaluate.tokens_per_step = 4", "list"]),
    "no speed": ({"evaluate.tokens_per_step": []}, ["evaluate.tokens_per_step", "at least 1"]),
    "more tokens per step than the canvas": ({"sampling.tokens_per_step": 99}, ["tokens_per_step = 99", "at most 16"]),
    "lora: true": ({"model.lora": True}, ["model.lora = True", SECTION, "lora: {rank: ...}"]),
    "lora: 8": ({"model.lora": 8}, ["model.lora = 8", SECTION]),
    "lora without a rank": ({"model.lora": {}}, ["missing key 'model.lora.rank'"]),
    "a rank above the width": ({"model.lora": {"rank": 64}}, ["lora.rank = 64", "32 wide", "at most 32"]),
    "a rank of 0": ({"model.lora": {"rank": 0}}, ["model.lora.rank = 0"]),
    "targets as text": ({"model.lora": {"rank": 2, "targets": "q_proj"}}, ["model.lora.targets = 'q_proj'", "list"]),
    "a mapping of rewards": ({"rewards": {"name": "sudoku"}}, ["rewards: must be a list", "'- '"]),
    "rewards as text": ({"rewards": "sudoku"}, ["rewards = 'sudoku'", "list"]),
    "an empty list of rewards": ({"rewards": []}, ["has no rewards of its own", "rewards:"]),
    "a reward without a name": ({"rewards": [{"weight": 1}]}, ["missing key 'rewards.0.name'"]),
    "a section that is a list": ({"run": [1]}, ["run = [1]", SECTION]),
    "a section that is text": ({"run": "x"}, ["run = 'x'", SECTION]),
    "a section that is null": ({"data": None}, ["data = None", SECTION]),
    "a teacher that is true": ({"model.teacher": True}, ["model.teacher = True", "teacher: {path: ...}"]),
    "a run called ..": ({"run.name": ".."}, ["run.name = '..'"]),
    "a run called a path": ({"run.name": "a/b"}, ["run.name = 'a/b'"]),
    "a run without a name": ({"run.name": ""}, ["run.name = ''"]),
    "a run called a number": ({"run.name": 5}, ["run.name = 5", "string"]),
    "a negative seed": ({"run.seed": -1}, ["run.seed = -1"]),
    "half a seed": ({"run.seed": 1.5}, ["run.seed = 1.5", "integer"]),
    "no steps": ({"run.steps": 0}, ["run.steps = 0"]),
    "no threads": ({"run.threads": 0}, ["run.threads = 0"]),
    "a folder that is a number": ({"run.output": 3}, ["run.output = 3", "string"]),
    "a folder in nothing": ({"run.output": "/proc/nowhere"}, ["/proc/nowhere"]),
    "a folder with a NUL": ({"run.output": "a\0b"}, ["run.output"]),
    "a folder with a long name": ({"run.output": "x" * 300}, ["File name too long", "shorten it"]),
    "a range the wrong way round": ({"data.keep_accuracy": [0.9, 0.1]}, ["keep_accuracy = (0.9, 0.1)", "low <= high"]),
    "no prompts": ({"data.prompts_per_step": 0}, ["data.prompts_per_step = 0"]),
    "a probability above 1": ({"sampling.top_p": 2}, ["sampling.top_p = 2"]),
    "no tokens to choose from": ({"sampling.top_k": 0}, ["sampling.top_k = 0"]),
    "an unknown preset": ({"sampling.preset": "lada"}, ["sampling.preset = 'lada'", "'llada'"]),
    "an unknown schedule": ({"sampling.schedule": "cosin"}, ["sampling.schedule = 'cosin'", "'static'"]),
    "a suppressed word": ({"sampling.suppress_tokens": ["a"]}, ["sampling.suppress_tokens.0 = 'a'", "integer"]),
    "a suppressed token that is not there": (
        {"sampling.suppress_tokens": [99999]},
        ["sampling.suppress_tokens", "no token 99999", "ids are 0 to"],
    ),
    "a negative token": ({"sampling.suppress_tokens": [-1]}, ["sampling.suppress_tokens.0 = -1"]),
    "a deferred token that is not there": ({"sampling.defer_tokens": [99999]}, ["sampling.defer_tokens", "99999"]),
    "an end token that is not there": ({"model.end_tokens": ["<nope>"]}, ["model.end_tokens: '<nope>'"]),
    "heads that do not share keys": ({"model.init.num_kv_heads": 3}, ["num_kv_heads = 3", "num_heads = 4"]),
    "a key that is a number": ({"learner": {1: 2}}, ["learner.1", "strings"]),
    "an unknown transport": ({"cluster.transport": "pigeon"}, ["unknown transport 'pigeon'", "broadcast"]),
    "an unknown rollouter": ({"rollout.rollouter": {"name": "multi"}}, ["unknown rollouter 'multi'", "single_turn"]),
    "an unknown strategy of evaluation": ({"evaluate.strategy": {"name": "entrpy"}}, ["'entrpy'", "'entropy'"]),
    "an unknown tracker": ({"tracking.to": ["wandbb"]}, ["tracking.to.0 = 'wandbb'", "'wandb'"]),
    "no checkpoint kept": ({"checkpoint.keep": 0}, ["checkpoint.keep = 0"]),
    "no reward workers": ({"reward_pool.workers": 0}, ["reward_pool.workers = 0"]),
    "a share above 1": ({"reward_pool.max_failure_fraction": 2}, ["reward_pool.max_failure_fraction = 2"]),
    "a pattern that is none": ({"rewards": [{"name": "format", "pattern": "("}]}, ["format.pattern = '('"]),
    "an empty task": ({"data.task": {"name": "sudoku4", "train_puzzles": 0}}, ["data.task", "at least 1"]),
    "an empty canvas": ({"sampling.max_new_tokens": 0}, ["sampling.max_new_tokens = 0"]),
    "two speeds": ({"sampling.steps": 4}, ["steps = 4 and tokens_per_step = 4", "leave one of them out"]),
    "two warm-ups": ({"learner.warmup_ratio": 0.1, "learner.warmup_steps": 3}, ["give one of them"]),
    "a stage that is not there": ({"learner.zero_stage": 4}, ["learner.zero_stage = 4", "0, 1, 2 or 3"]),
}  # fmt: skip


@pytest.mark.parametrize("case", VALUES)
def test_values(case, write, refuse, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    changes, words = VALUES[case]
    refuse(["train", str(write(changes)), "--quiet"], words)


# name: (what becomes of the file, words)
FILES: dict[str, tuple[Callable[[str], str | bytes], list[str]]] = {
    "Latin-1": (lambda text: text.encode() + b"# th\xe9\n", ["config.yaml', line 38: not UTF-8", "save the file as"]),
    "UTF-16": (lambda text: text.encode("utf-16"), ["config.yaml', line 1: not UTF-8"]),
    "a NUL": (lambda text: "\0" + text, ["config.yaml", "not valid YAML"]),
    "a tab": (lambda text: text + "\tx: 1\n", ["config.yaml, line 38"]),
    "half a character": (lambda text: text.replace("name: run", 'name: "\\ud83d"'), ["half of a surrogate pair"]),
    "100,000 lists": (lambda text: "x: " + "[" * 100_000, ["config.yaml", "nested too deeply"]),
    "100,000 mappings": (lambda text: "x: " + "{a: " * 100_000, ["config.yaml", "nested too deeply"]),
    "100,000 levels of JSON": (lambda text: '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", ["nested too deeply"]),
    "a key twice": (lambda text: text + "run: {}\n", ["config.yaml, line 38", "the key 'run' is given twice"]),
    "a key twice, in JSON": (lambda text: '{"run": {"name": "a", "name": "b"}}', ["the key 'name' is given twice"]),
    "a list as a key": (lambda text: text + "? [1]\n: 2\n", ["line 38", "[1] cannot be a key"]),
    "an alias of nothing": (lambda text: text + "x-a: *nope\n", ["line 38", "undefined alias 'nope'"]),
    "an alias of itself": (lambda text: text + "x-a: &a [*a]\n", ["line 38", "recursive"]),
    "code": (lambda text: text + "x-a: !!python/object:os.system 1\n", ["line 38", "could not determine a"]),
    "no date": (lambda text: text + "x-a: 2001-99-99\n", ["month must be in 1..12", "quotes"]),
    "a merge of a number": (lambda text: text + "x-b: {<<: 3}\n", ["line 38", "for merging"]),
    "two merges": (lambda text: text + "x-a: &a {b: 1}\nx-b: {<<: *a, <<: *a}\n", ["'<<' is given twice"]),
    "two documents": (lambda text: text + "---\na: 1\n", ["line 38", "another document"]),
    "two parents": (lambda text: "extends: [a, b]\n" + text, ["extends = ['a', 'b']", "name one file"]),
    "a folder as parent": (lambda text: "extends: .\n" + text, ["no configuration file"]),
    "text alone": (lambda text: "hello", ["holds str", "sections such as"]),
    "an anchor's place in a section": (lambda text: text.replace("run:", "run:\n  x-a: 1"), ["unknown key 'run.x-a'"]),
}  # fmt: skip


@pytest.mark.parametrize("case", FILES)
def test_files(case, write, refuse):
    spoil, words = FILES[case]
    path = write()
    changed = spoil(path.read_text())
    path.write_bytes(changed if isinstance(changed, bytes) else changed.encode())
    refuse(["train", str(path), "--quiet"], words)


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("learner.lr=" + "[" * 100_000, ["override 'learner.lr'", "nested too deeply"]),
        ("run.name=\udce9", ["override 'run.name'", "half of a surrogate pair"]),
        ("=3", ["override '=3'", "section.key=value"]),
        ("run..name=3", ["unknown key 'run.'"]),
        ("run.name.x=3", ["override 'run.name.x'", "plain value"]),
        ("rewards.x.weight=1", ["'x' is not a position"]),
        ("learner={lr: 1, lr: 2}", ["override 'learner'", "the key 'lr' is given twice"]),
        ("sampling.temperature=.inf", ["sampling.temperature = inf", FINITE]),
    ],
    ids=lambda value: value[:12].encode("ascii", "replace").decode() if isinstance(value, str) else "",
)
def test_overrides(argument, words, write, refuse):
    refuse(["train", str(write()), argument, "--quiet"], words)


PLUGIN_FILES = {
    "syntax error": ("x = 1\ndef reward(:\n", ["SyntaxError", "bad_plugin.py, line 2"]),
    "missing import": ("import json\nimport not_there\n", ["No module named 'not_there'", "bad_plugin.py, line 2"]),
    "error at import": ("x = 1\ny = x.z\n", ["AttributeError", "'int' object has no attribute 'z'", "line 2"]),
    "missing name": ("def rewards(): pass\n", ["has no 'reward'", "nearest is 'rewards'"]),
    "always None": (
        "def reward(prompts, completions, **columns):\n    return [None] * len(completions)\n",
        ["reward self-test: 'bad_plugin:reward' gave no reward (None or NaN)", "return a number"],
    ),
}


@pytest.mark.parametrize("case", PLUGIN_FILES)
def test_files_of_rewards(case, write, refuse, tmp_path, monkeypatch):
    text, words = PLUGIN_FILES[case]
    (tmp_path / "bad_plugin.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "bad_plugin", raising=False)
    rewards = [{"name": "sudoku"}, {"name": "bad_plugin:reward"}]
    refuse(["train", str(write({"rewards": rewards})), "--quiet"], [*words])


def test_a_file_in_the_place_of_the_output(write, refuse, tmp_path):
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        (tmp_path / "file").write_text("mine")
        refuse(["train", str(write({"run.output": str(place)})), "--quiet"], [str(place), "a file is where a folder"])
        assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    ("number", "words"), [(28, "the disk is full"), (30, "the file system is read-only"), (13, "change its rights")]
)
def test_a_system_that_refuses_the_folder(number, words, write, refuse, tmp_path, monkeypatch):
    """As an administrator may write anywhere, the errors of the system are raised in its place."""

    def refused(self, *args, **kwargs):
        raise OSError(number, "refused", str(self))

    monkeypatch.setattr("pathlib.Path.mkdir", refused)
    refuse(["train", str(write()), "--quiet"], [str(tmp_path / "runs"), words])


def test_a_refused_plan_leaves_room_for_another_model(write, refuse, tmp_path):
    """The new model of a refused plan would be taken for that of the next one, whatever the next one asks for."""
    refuse(["train", str(write({"sampling.max_new_tokens": 40})), "--quiet"], ["no room for a prompt"])
    assert main(["train", str(write({"model.init.hidden_size": 48, "run.steps": 1})), "--quiet"]) == 0
    made = json.loads((tmp_path / "runs" / "run" / "initial" / "config.json").read_text())
    assert made["hidden_size"] == 48


def test_more_prompts_than_rows_are_said_and_wrapped(write, capsys):
    task = {"name": "sudoku4", "train_puzzles": 3, "test_puzzles": 2, "min_holes": 4, "max_holes": 6}
    assert main(["train", str(write({"data.task": task, "data.prompts_per_step": 8, "run.steps": 1}))]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "data.prompts_per_step = 8 is more than the 3 rows" in said and "set at most 3" in said


def test_merge_keys_and_places_for_anchors(write):
    path = write()
    values = yaml.safe_load(path.read_text())
    values["learner"] = "HERE"
    text = yaml.safe_dump(values).replace("learner: HERE", "learner: {<<: *slow, lr: 2.0e-4}")
    path.write_text("x-slow: &slow {lr: 1.0e-5, weight_decay: 0.25}\n" + text)
    learner = load_config(path).learner
    assert (learner.lr, learner.weight_decay) == (2e-4, 0.25), "the section's own keys win"


def test_a_typing_error_is_told_without_torch(write):
    """In a process of its own: what was imported, rather than how long it took."""
    code = (
        "import sys\n"
        "from dllm_rl.cli.main import main\n"
        "codes = [main([command, sys.argv[1], change]) for command in ('train', 'eval', 'draws', 'submit')\n"
        "         for change in ('learner.lrr=1', 'algorithm.name=trace_lr', 'sampling.temperature=.nan')]\n"
        "print(codes, sorted({'torch', 'numpy', 'transformers', 'ray', 'datasets'} & set(sys.modules)))\n"
    )
    command = [sys.executable, "-c", code, str(write())]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"{[2] * 12} []", done
    assert len(done.stderr.splitlines()) == 12 and "nearest is 'trace_rl'" in done.stderr


def test_a_missing_import_in_a_process_of_its_own(write, tmp_path):
    (tmp_path / "mine.py").write_text("import nowhere_to_be_found\n")
    config = write({"rewards": [{"name": "sudoku"}, {"name": "mine:reward"}]})
    command = [sys.executable, "-m", "dllm_rl", "train", str(config), "--quiet"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
    assert "nowhere_to_be_found" in done.stderr and "mine.py, line 1" in done.stderr
