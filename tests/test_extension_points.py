"""The table "Where do I change what" of docs/architecture.md, row by row, with a package of somebody else's.

Files of tests/extensions/acme, copied to a folder on sys.path, add one of each; none of ours is touched.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml

from dllm_rl.cli.main import main
from dllm_rl.config.load import load_config
from dllm_rl.conformance.suite import SUBJECTS, check_plugin
from dllm_rl.driver.evaluate_target import evaluate_target
from dllm_rl.errors import UserError
from dllm_rl.models.cache import BlockCache
from dllm_rl.reports.progress import Quiet
from dllm_rl.reports.run_folder import read_rows
from dllm_rl.train import train
from dllm_rl.types import Prompt, Sampling, WeightsVersion
from rollouts.native import NativeSampler

ROOT = Path(__file__).resolve().parents[1]
EXERCISED = {  # row of the table -> the test below that needs it
    "algorithm": "test_a_run_of_foreign_parts",
    "strategy": "test_a_run_of_foreign_parts",
    "cache": "test_a_run_of_foreign_parts",
    "family": "test_a_run_of_foreign_parts",
    "engine": "test_an_engine_gets_its_weights_through_a_transport",
    "task": "test_a_run_of_foreign_parts",
    "reward": "test_a_run_of_foreign_parts",
    "environment": "test_a_run_of_foreign_parts",
    "benchmark": "test_a_benchmark_is_a_task_and_a_configuration",
    "transport": "test_an_engine_gets_its_weights_through_a_transport",
    "metric": "test_a_run_of_foreign_parts",
}
MODEL = {"init": {"hidden_size": 32, "num_layers": 1, "num_heads": 4, "max_length": 24}, "block_size": 2}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder that the package lies in; engine.py is the one of the tests of engines."""
    folder = tmp_path_factory.mktemp("site")
    shutil.copytree(ROOT / "tests" / "extensions" / "acme", folder / "acme")
    shutil.copy(ROOT / "tests" / "driver" / "foreign" / "table_engine.py", folder / "acme" / "engine.py")
    return folder


@pytest.fixture(autouse=True)
def package(site, monkeypatch):
    monkeypatch.syspath_prepend(str(site))
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "acme"]:
        del sys.modules[name]


def foreign(output, **changes):
    """A run all of whose parts are foreign but the engine and the transport."""
    return {
        "run": {"name": "run", "steps": 2, "threads": 1, "log_samples": 99, "output": str(output)},
        "model": {"family": "acme.family:ACME", **MODEL},
        "data": {"task": {"name": "acme.task:Echo", "last": 40}, "prompts_per_step": 4, "samples_per_prompt": 4},
        "sampling": {"max_new_tokens": 4, "tokens_per_step": 2, "strategy": {"name": "acme.strategy:Rightmost"}},
        "rollout": {"rollouter": {"name": "acme.environment:TryAgain"}},
        "algorithm": {"name": "acme.algorithm:OneViewGRPO"},
        "rewards": [{"name": "acme.reward:same_digits"}, {"name": "format", "pattern": "^[0-9]"}],
        "engine": {"name": "native", "cache": "acme.cache:WindowCache"},
        "learner": {"lr": 1e-3},
        "reward_pool": {"workers": 1, "self_test": 2},
        "evaluate": {"limit": 4, "at_start": False},
        **changes,
    }


def config_of(values, path):
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture(scope="module")
def finished(site, tmp_path_factory):
    """The run folder, and what the package's own counters say."""
    output = tmp_path_factory.mktemp("runs")
    sys.path.insert(0, str(site))
    try:
        folder = train(load_config(config_of(foreign(output), output / "run.yaml"))).folder
        counts = {
            "selections": importlib.import_module("acme.strategy").Rightmost.calls,
            "commits": importlib.import_module("acme.cache").WindowCache.commits,
        }
    finally:
        sys.path.remove(str(site))
    return folder, counts


def test_a_run_of_foreign_parts(finished):
    folder, counts = finished
    rows = list(read_rows(folder / "metrics.jsonl"))
    steps = [row for row in rows if "loss" in row]
    assert len(steps) == 2 and all(row["grad_norm"] > 0 for row in steps), "the algorithm learns"
    assert all(row["acme/surprise"] > 0 for row in steps), "the metric is logged"
    assert "reward/acme.reward:same_digits" in steps[0], "the reward scores"
    samples = list(read_rows(folder / "samples.jsonl"))
    assert {row["turn"] for row in samples} == {0, 1}, "the environment has two turns"
    assert all(row["uid"].startswith("echo-") for row in samples), "the task gives the prompts"
    assert counts["selections"] and counts["commits"], "the strategy and the cache decode"
    saved = (folder / "checkpoints" / "step-000002" / "model" / "config.json").read_text()
    assert '"model_type": "acme"' in saved, "the family is saved"


def test_a_benchmark_is_a_task_and_a_configuration(finished, site):
    checkpoint = finished[0] / "checkpoints" / "step-000002" / "model"
    results = evaluate_target(site / "acme" / "benchmark.yaml", [f"model.path={checkpoint}"], Quiet())
    assert [result.tokens_per_step for result in results] == [1, 2]
    assert all(result.scored == 8 and 0 <= result.success <= 1 for result in results)
    assert set(results[0].components) == {"acme.reward:same_digits"}


def test_an_engine_gets_its_weights_through_a_transport(tmp_path):
    diary = tmp_path / "diary"
    changes = {
        "model": {"family": "tiny", "init": MODEL["init"]},
        "engine": {"name": "acme.engine:TableEngine", "diary": str(diary)},
        "cluster": {"transport": "acme.transport:ThroughFiles"},
        "algorithm": {"name": "coupled_grpo", "beta": 0.0},
        "evaluate": {"at_start": False, "at_end": False},
    }
    train(load_config(config_of(foreign(tmp_path, **changes), tmp_path / "run.yaml")))
    pushes = diary.read_text().count("pushed")
    assert pushes >= 3 and importlib.import_module("acme.transport").ThroughFiles.files == pushes


@pytest.mark.parametrize(
    ("transport", "why"),
    [("broadcast", "it works between processes"), ("object_store", "it needs a connection to Ray")],
)
def test_transports_that_need_several_processes_are_refused(tmp_path, transport, why, monkeypatch):
    monkeypatch.setattr("ray.is_initialized", lambda: False)  # other tests may have connected this process
    changes = {
        "model": {"family": "tiny", "init": MODEL["init"]},
        "engine": {"name": "acme.engine:TableEngine"},
        "cluster": {"transport": transport},
        "algorithm": {"name": "coupled_grpo", "beta": 0.0},
    }
    with pytest.raises(UserError, match=f"cluster.transport = {transport} with cluster.kind: local: {why}"):
        train(load_config(config_of(foreign(tmp_path, **changes), tmp_path / "run.yaml")))


def test_the_documented_engine_keeps_its_contract_and_trains(tmp_path, monkeypatch):
    text = (ROOT / "docs" / "plugins.md").read_text(encoding="utf-8")
    (tmp_path / "documented_engines.py").write_text(text[text.index("# my_package/engines.py") :].partition("```")[0])
    monkeypatch.syspath_prepend(str(tmp_path))
    name = "documented_engines:OneForward"
    assert {f.check: f.problem for f in check_plugin("engines", name, {}) if f.problem is not None} == {}
    changes = {
        "model": {"family": "tiny", "init": MODEL["init"]},
        "engine": {"name": name},
        "algorithm": {"name": "coupled_grpo", "beta": 0.0},
    }
    done = train(load_config(config_of(foreign(tmp_path, **changes), tmp_path / "run.yaml")))
    assert done.steps == 2 and done.after[0].scored == 4


def test_an_undeclared_metric_is_one_line_and_exit_code_2(tmp_path, capsys):
    values = foreign(tmp_path, algorithm={"name": "acme.algorithm:Forgetful"})
    assert main(["train", str(config_of(values, tmp_path / "run.yaml")), "--quiet"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: algorithm 'acme.algorithm:Forgetful': loss() logs the metric 'acme/surprise'")


def test_an_unknown_cache_is_refused_with_the_nearest(tmp_path):
    config = load_config(
        config_of(foreign(tmp_path, engine={"name": "native", "cache": "blocks"}), tmp_path / "a.yaml")
    )
    with pytest.raises(UserError, match=r"engine: unknown cache 'blocks'; nearest is 'block'"):
        train(config)


@pytest.mark.parametrize("origin", ["response", "sequence"])
def test_another_exact_cache_decodes_the_same_tokens(tiny_denoiser, origin):
    from acme.cache import WindowCache
    from acme.strategy import Rightmost

    denoiser = tiny_denoiser("sdar", block_size=4, block_origin=origin)
    prompts = [
        Prompt(uid=f"p{n}", token_ids=tuple(range(3, 3 + n)), text="", answer="", task="t") for n in (1, 3, 6, 8)
    ]
    found = [
        NativeSampler(
            denoiser, Rightmost(Rightmost.Config()), weights=WeightsVersion(step=0, digest="x"), cache_type=cache
        ).generate(prompts, Sampling(max_new_tokens=10, tokens_per_step=2), seed=1, samples_per_prompt=3)
        for cache in (BlockCache, WindowCache)
    ]
    for one, other in zip(*found, strict=True):
        assert torch.equal(one.tokens, other.tokens) and torch.equal(one.unmask_step, other.unmask_step)
        torch.testing.assert_close(one.behaviour_logp, other.behaviour_logp, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("algorithms", "acme.algorithm:OneViewGRPO"),
        ("strategies", "acme.strategy:Rightmost"),
        ("tasks", "acme.task:Echo"),
        ("rewards", "acme.reward:same_digits"),
        ("families", "acme.family:ACME"),
    ],
)
def test_the_examples_keep_their_contracts(kind, name):
    assert kind in SUBJECTS
    assert {f.check: f.problem for f in check_plugin(kind, name, {}) if f.problem is not None} == {}


TEXT = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


def table() -> list[list[str]]:
    """Cells of "Where do I change what": row, place of ours, contract, key of the configuration, example."""
    section = TEXT.partition("## Where do I change what")[2].partition("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[2:]]


def defines(file: str, name: str) -> bool:
    """Whether a file defines a function, a class, or "Class.method"."""
    body = ast.parse((ROOT / file).read_text(encoding="utf-8")).body
    for part in name.split("."):
        found = [n for n in body if isinstance(n, ast.ClassDef | ast.FunctionDef) and n.name == part]
        if not found:
            return False
        body = found[0].body
    return True


def test_the_table_names_what_is_exercised_here():
    assert [cells[0] for cells in table()] == list(EXERCISED)
    assert all(callable(globals()[test]) for test in EXERCISED.values())


@pytest.mark.parametrize("cells", table(), ids=lambda cells: cells[0])
def test_a_row_of_the_table_is_true(cells):
    _, ours, contract, key, example = cells
    places, examples, contracts = (re.findall(r"`([^`]+)`", cell) for cell in (ours, example, contract))
    assert places and contracts and "`" in key and 1 <= len(examples) <= 2, "one or two files"
    assert all((ROOT / place).exists() for place in places), places
    assert all((ROOT / file).is_file() for file in examples), examples
    assert all(defines(*entry.split("::")) for entry in contracts), contracts


def test_the_stations_of_the_walks_exist():
    """Every `file.py:function` of the document."""
    stations = re.findall(r"`([\w/]+\.py):(\w[\w.]*)`", TEXT)
    assert len(stations) > 20 and not defines("dllm_rl/types.py", "Loss.nonsense")
    for file, name in stations:
        assert defines(file, name), f"{file}:{name}"


def test_the_layers_are_those_of_the_code():
    block = re.search(r"## Import layers.*?```text\n(.*?)```", TEXT, re.S)
    assert block is not None
    written = [line.split() for line in block[1].splitlines()]
    spec = importlib.util.spec_from_file_location("structure", ROOT / "tests" / "test_structure.py")
    assert spec is not None and spec.loader is not None
    structure = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(structure)
    assert written == structure.LAYERS
