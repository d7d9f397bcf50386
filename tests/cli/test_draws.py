"""The curve of how many draws a likelihood needs."""

from __future__ import annotations

import json

import pytest

from dllm_rl.cli.main import main

# Rewards that a random model gets now and then, so that the update has something to learn from.
SHAPES = {"data.prompts_per_step": 4, "data.samples_per_prompt": 4, "learner.lr": 1e-2}


def draws(write, tmp_path, algorithm, *more):
    path, picture = tmp_path / "draws.json", tmp_path / "draws.png"
    config = write(SHAPES | {"algorithm": algorithm})
    arguments = ["draws", str(config), "--quiet", "--redraws", "24", "--json", str(path), "--plot", str(picture), *more]
    assert main(arguments) == 0
    assert picture.stat().st_size > 0
    return json.loads(path.read_text())


def test_more_draws_make_less_noise(write, tmp_path, capsys):
    result = draws(write, tmp_path, {"name": "espo"}, "--vary", "pairs=1,4,16")
    curve = result["curve"]
    assert [(row["value"], row["forwards"]) for row in curve] == [(1, 2), (4, 8), (16, 32)]
    for name in ("likelihood_noise", "ratio_noise"):
        assert curve[0][name] > 1.3 * curve[1][name] > 1.6 * curve[2][name] > 0
    assert curve[2]["signal_to_noise"] > curve[0]["signal_to_noise"]
    assert curve[0]["ratio_noise"] < curve[0]["likelihood_noise"], "draws are shared between old and new"
    assert "signal : noise" in capsys.readouterr().out


def test_an_estimator_without_randomness_is_exact(write, tmp_path, capsys):
    (row,) = draws(write, tmp_path, {"name": "trace_rl"})["curve"]
    assert row["likelihood_noise"] == row["ratio_noise"] == 0 and row["ratio_signal"] > 0
    assert row["signal_to_noise"] is None and "exact" in capsys.readouterr().out


def test_pairs_stay_whole(write, tmp_path):
    result = draws(write, tmp_path, {"name": "vrpo"}, "--vary", "draws=1,8", "--rows", "5")
    assert [row["forwards"] for row in result["curve"]] == [1, 8]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--vary", "pears=1,2"], ["--vary pears=1,2", "pairs"]),
        (["--vary", "pairs"], ["option=value,value"]),
        (["--vary", "pairs=0"], ["algorithm.pairs", "at least 1"]),
        (["--json", "/no/such/folder/x.json"], ["/no/such/folder"]),
    ],
    ids=["unknown", "no values", "out of range", "no folder"],
)
def test_bad_arguments(arguments, words, write, refuse):
    refuse(["draws", str(write({"algorithm": {"name": "espo"}})), "--quiet", *arguments], words)


def test_a_policy_has_nothing_to_draw(write, refuse):
    strategy = {"sampling.strategy": {"name": "learned"}, "sampling.temperature": 0.0}
    config = write({"algorithm": {"name": "unmasking_policy"}} | strategy)
    refuse(["draws", str(config), "--quiet"], ["'unmasking_policy'", "nothing to draw"])


def test_a_batch_without_a_signal_says_so(write, refuse):
    config = write({"rewards": [{"name": "sudoku"}], "algorithm": {"name": "espo"}})
    refuse(["draws", str(config), "--quiet"], ["have an advantage", "data.prompts_per_step"])
