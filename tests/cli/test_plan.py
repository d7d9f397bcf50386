"""dllm-rl plan: what it prints, writes and refuses, without weights."""

from __future__ import annotations

import json

import pytest

from dllm_rl.cli.main import main
from dllm_rl.models.create import create_denoiser
from dllm_rl.models.loading import save_denoiser
from dllm_rl.models.tokenizers import byte_bpe_tokenizer


@pytest.fixture
def no_weights(tmp_path):
    """A model folder with config.json and tokenizer alone."""
    tokenizer = byte_bpe_tokenizer(["a sudoku"], 300)
    size = {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "max_length": 64}
    save_denoiser(create_denoiser("llada", tokenizer, **size, seed=0), tokenizer, tmp_path / "model")
    for file in (tmp_path / "model").glob("*.safetensors*"):
        file.unlink()
    return str(tmp_path / "model")


def test_a_plan_in_words(write, no_weights, tmp_path, capsys):
    path = tmp_path / "plan.json"
    lora = {"model": {"path": no_weights, "dtype": "bfloat16", "lora": {"rank": 4, "targets": ["q_proj", "ff_out"]}}}
    options = ["--card", "rtx4090-24gb", "--price", "2", "--json", str(path)]
    assert main(["plan", str(write(lora)), *options]) == 0
    shown = capsys.readouterr().out
    for words in (
        "2 prompts x 2 samples = 4 rows",
        "q_proj: 2 modules",
        "ff_out: 2 modules",
        "tokens a forward (learner.tokens_per_microbatch = 16384)",
        "at most 4 forwards to decode a row",
        "optimiser update a step",
        "tokens of at most 48",
        "fits",
        "at 30% of 165 TFLOP/s",
        "at 2 an hour",
    ):
        assert words in shown, (words, shown)
    found = json.loads(path.read_text())
    assert found["fits"] and found["matches"]["q_proj"] == [2, 2 * 4 * (64 + 64)]
    assert found["states"]["moments"] == 8 * found["states"]["trained"] + 4 * 8, "four matrices A, four B"
    assert not (tmp_path / "runs").exists(), "a plan leaves nothing behind"


def test_what_does_not_fit_says_what_would(write, no_weights, tmp_path, capsys):
    path = tmp_path / "plan.json"
    changes = {"model": {"path": no_weights}, "data.prompts_per_step": 64}
    assert main(["plan", str(write(changes)), "--memory-gb", "0.68", "--json", str(path)]) == 1
    shown = capsys.readouterr().out
    assert "TOO LARGE" in shown and "learner.tokens_per_microbatch=" in shown
    assert "unknown: give --tflops" in shown
    found = json.loads(path.read_text())
    assert not found["fits"]
    peaks = [one["peak"] for one in found["changes"]]
    assert peaks == sorted(peaks) and peaks[0] < found["peak"]


def test_the_speed_of_another_run(write, finished_run, tmp_path, capsys):
    path = tmp_path / "plan.json"
    assert main(["plan", str(write()), "run.steps=100", "--like", str(finished_run), "--json", str(path)]) == 0
    assert f"as {finished_run} ran" in capsys.readouterr().out
    rows = [json.loads(line) for line in (finished_run / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in rows if "update_s" in row][-1]
    seconds = json.loads(path.read_text())["seconds_per_step"]
    assert seconds["updating"] == pytest.approx(last["update_s"]) and seconds["decoding"] == pytest.approx(
        last["rollout_s"]
    )


def test_a_hub_model_is_planned_without_its_weights(write, no_weights, monkeypatch, capsys):
    asked = []

    def download(name, *, revision, allow_patterns):
        asked.append((name, revision, allow_patterns))
        return no_weights

    monkeypatch.setattr("dllm_rl.models.loading.snapshot_download", download)
    changes = {"model": {"path": "owner/model", "revision": "main"}}
    assert main(["plan", str(write(changes)), "--card", "rtx4090-24gb"]) == 0
    ((name, revision, patterns),) = asked
    assert (name, revision) == ("owner/model", "main") and "*.json" in patterns
    assert not any("safetensors" in pattern or pattern.endswith(".bin") for pattern in patterns)
    assert "family 'llada'" in capsys.readouterr().out


REFUSED = {
    "a target that matches nothing": (
        ["model.lora={rank: 2, targets: [c_attn]}"],
        ["lora.targets: 'c_attn' matches no module of family 'tiny'"],
    ),
    "what launch refuses": (["sampling.temperature=0"], ["sampling.temperature = 0 makes all samples"]),
    "what the engine cannot do": (["sampling.cfg_scale=1.0", "model.family=dream"], ["sampling.cfg_scale = 1.0"]),
    "a prompt that is too long": (["data.max_prompt_tokens=3"], ["its prompt has", "3 are allowed"]),
    "an unknown reward": (["rewards=[{name: sudokuu}]"], ["sudokuu", "nearest is 'sudoku'"]),
    "an unknown card": (["--card", "h100-80g"], ["--card h100-80g: unknown", "nearest is 'h100-80gb'"]),
    "no speed": (["--tflops", "0"], ["--tflops 0: must be above 0"]),
    "no run": (["--like", "nowhere"], ["--like nowhere: is not a run folder"]),
    "4 bits on a CPU": (["model.lora={rank: 2}", "model.quantize=nf4"], ["model.quantize = nf4 needs a GPU", "--card"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case, write, refuse):
    arguments, words = REFUSED[case]
    refuse(["plan", str(write()), *arguments], words)
