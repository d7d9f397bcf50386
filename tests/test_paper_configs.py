"""The configurations of the papers: headers that are what their values come to, and runs with tiny models."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import sys
from pathlib import Path

import pytest

from dllm_rl.config.load import load_config, validate
from dllm_rl.train import train

ROOT = Path(__file__).resolve().parents[1]
spec = importlib.util.spec_from_file_location("paper_costs", ROOT / "scripts/reproduce/paper_costs.py")
paper_costs = sys.modules["paper_costs"] = importlib.util.module_from_spec(spec)  # dataclasses look their module up
spec.loader.exec_module(paper_costs)
FILES = paper_costs.files()
QUICK = ("diffu_grpo_paper", "coupled_grpo_paper", "trace_rl_paper", "vrpo_paper")  # one of each family and source
FAMILIES = {"GSAI-ML": "llada", "apple": "dream", "JetLM": "sdar"}  # by the owner of the checkpoint
CANVAS, VOCABULARY = 32, 300
GRADED, SOLVED = "light_rewards:apart", "light_rewards:right"
ASK_WHETHER_SOLVED = ("opd", "lightning_rl", "unmasking_policy")


def header(path):
    """The comment above the first key, by its parts: "sources:", "differs:", "cost:", "expected:"."""
    lines = []
    for line in path.read_text().splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").removeprefix(" "))
    parts, name = {"": ""}, ""
    for line in lines:
        first, colon, rest = line.partition(":")
        if colon and first in ("sources", "differs", "cost", "expected"):
            name, line = first, rest
        parts[name] = f"{parts.get(name, '')} {line}".strip()
    return parts


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_headers_say_what_the_values_come_to(path):
    lines = paper_costs.cost(load_config(path)).lines()
    assert [line for line in path.read_text().splitlines() if line.startswith(paper_costs.MARK)] == lines, (
        "run scripts/reproduce/paper_costs.py --write"
    )
    assert all(len(line) <= 120 for line in lines)


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_headers_have_sources_differences_costs_and_what_to_expect(path):
    parts = header(path)
    assert all(parts.get(name) for name in ("", "sources", "differs", "cost", "expected")), sorted(parts)
    assert "arXiv:" in parts[""], "the paper"


def test_sizes_are_those_that_are_published():
    billions = {name: shape.parameters / 1e9 for name, shape in paper_costs.SHAPES.items()}
    assert billions == pytest.approx(
        {
            "GSAI-ML/LLaDA-8B-Instruct": 8.02,
            "apple/DiffuCoder-7B-Instruct": 7.62,
            "JetLM/SDAR-8B-Chat": 8.19,
            "JetLM/SDAR-8B-Chat-b32": 8.19,
        },
        abs=0.005,
    )


def test_counts_by_hand():
    """d1: 7,700 updates, 12 to a batch of 16 x 6 rows of 256 tokens, 2 a forward; old and reference on 12 draws."""
    config = load_config(ROOT / "configs/methods/diffu_grpo_paper.yaml")
    found = paper_costs.cost(config)
    assert found.steps == math.ceil(7700 / 12) and found.steps * found.updates_per_step == 7704
    assert (found.prompts, found.samples, found.forwards, found.draws) == (16, 6, 128, 1)
    rows, sequence = 642 * 16 * 6, 128 + 256
    token = 2 * 8.015314944e9 + 4 * 32 * 4096 * sequence
    assert found.decoding == pytest.approx(rows * 128 * sequence * token)
    assert found.scoring == pytest.approx(rows * (11 + 12) * sequence * token), "the first update scores the old policy"
    assert found.updating == pytest.approx(rows * 12 * sequence * token * (2 + 1 + 1)), "backward, recomputation"
    hours = (found.decoding + found.scoring + found.updating) / (0.3 * 989e12 * 3600)
    assert found.gpu_hours == pytest.approx(hours)
    layer = 4 * 4096**2 + 3 * 4096 * 12288
    adapter = 32 * 128 * (3 * (4096 + 4096) + (4096 + 12288))
    assert found.memory == pytest.approx(
        {"weights": (32 * layer * 4.127 / 8 + 2 * 2 * 126464 * 4096) / 1e9, "adapter with AdamW": 16 * adapter / 1e9}
    )


def test_counts_of_blocks_by_hand():
    """TraceRL: a forward per token and one per block of 4, over a cache; 4 views of twice the canvas per likelihood."""
    config = load_config(ROOT / "configs/methods/trace_rl_paper.yaml")
    found, rows = paper_costs.cost(config), 80 * 64 * 16
    per_layer = 4 * 36 * 4096 * 2128
    token = 2 * 8.190427136e9
    prompt = 128 * (token + 4 * 36 * 4096 * 128)
    assert (found.forwards, found.draws) == (2000, 4)
    assert found.decoding == pytest.approx(rows * (prompt + (2000 + 500) * 4 * (token + per_layer)))
    view = (128 + 2 * 2000) * (token + per_layer)
    assert found.updating == pytest.approx(rows * 4 * view * (2 + 2 + 1))


def test_a_header_that_lies_is_found(tmp_path, capsys):
    copy = tmp_path / "vrpo_paper.yaml"
    text = (ROOT / "configs/methods/vrpo_paper.yaml").read_text()
    copy.write_text(text.replace("steps: ", "steps: 1"))
    assert paper_costs.main([str(copy)]) == 1 and "vrpo_paper.yaml" in capsys.readouterr().out
    assert paper_costs.main([str(copy), "--write"]) == 0 and copy.read_text() != text
    assert paper_costs.main([str(copy)]) == 0


def shrunk(path, tmp_path, *, ray=False):
    """The configuration as it is written, but for what a laptop without network cannot have.

    Replaced: the checkpoint by a random model of its family (model.init), with fewer and shorter rows; the data by rows
    of the same columns; what needs CUDA (nf4) or several GPUs (Ray, ZeRO 3) by one process, which runs DeepSpeed where
    that is written. A random model is never right, so that a reward that tells texts apart stands beside those written;
    where a method asks whether a row is solved, all of them are.
    """
    config = load_config(path)
    values = config.model_dump(exclude={"provenance"})
    factor = config.sampling.max_new_tokens // CANVAS
    values["run"] |= {"steps": 2, "threads": 1, "output": str(tmp_path)}
    width = 32 if config.model.lora is None else max(32, config.model.lora.rank)  # a rank above it is refused
    init = {"hidden_size": width, "num_layers": 1, "num_heads": 4, "max_length": 1024, "tokenizer": "byte_bpe"}
    family = FAMILIES[config.model.path.split("/")[0]]
    values["model"] |= {"path": None, "init": init | {"vocab_size": VOCABULARY}, "family": family, "quantize": None}
    values["model"]["end_tokens"] = ["<eos>"] if config.model.end_tokens else []  # the tiny tokenizer has no other
    values["data"]["keep_accuracy"] = None  # no group of a random model lies in a range
    values["data"] |= {"prompts_per_step": 2, "samples_per_prompt": 3, "max_prompt_tokens": None}
    values["data"]["task"] = task(config, tmp_path)
    values["sampling"]["max_new_tokens"] = CANVAS
    if config.sampling.steps is not None:
        values["sampling"]["steps"] = max(1, config.sampling.steps // factor)
    if config.sampling.block_size is not None:
        values["sampling"]["block_size"] = min(config.sampling.block_size, CANVAS // 2)
    if config.sampling.strategy.name == "confidence_threshold":  # 0.9 is more than a random model is ever sure of
        values["sampling"]["strategy"]["threshold"] = 1 / VOCABULARY
    if config.sampling.tokens_per_step == config.sampling.max_new_tokens:  # a canvas a forward
        values["sampling"]["tokens_per_step"] = CANVAS
    values["learner"] |= {"updates_per_step": min(2, config.learner.updates_per_step)}
    if ray:
        values["cluster"] |= {"engines": 1, "learners": 2}
    else:  # ZeRO 3 takes apart what one process decodes with
        values["cluster"], values["learner"]["zero_stage"] = {}, min(2, config.learner.zero_stage)
    values["evaluate"]["limit"] = 2
    values["diagnostics"]["rows"] = 1
    if config.algorithm.name in ASK_WHETHER_SOLVED:
        values["rewards"], values["reward_pool"]["self_test"] = None, 0
    elif config.data.task.name != "rows":
        values["rewards"] = [*(values["rewards"] or [{"name": "math_answer"}]), {"name": GRADED}]
    return validate(values)


def task(config, tmp_path):
    """The task with rows of our own."""
    chosen, number = config.data.task, 6
    questions = [f"What is {n} + {n}?" for n in range(number)]
    if chosen.name == "gsm8k":
        rows = [{"question": q, "answer": f"{n} and {n} are {2 * n}.\n#### {2 * n}"} for n, q in enumerate(questions)]
    elif chosen.name == "math":
        rows = [{"problem": q, "solution": f"\\boxed{{{2 * n}}}"} for n, q in enumerate(questions)]
    else:
        assert chosen.name == "rows"
        pairs = config.algorithm.name == "vrpo"
        texts = [{"chosen": f"{2 * n}", "rejected": "no"} if pairs else {"completion": "yes"} for n in range(number)]
        rows = [{"prompt": q, "answer": f"{2 * n}", **texts[n]} for n, q in enumerate(questions)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    if chosen.name == "rows":
        return {"name": "rows"} | chosen.options | {"train_file": str(file)}
    if config.algorithm.name in ASK_WHETHER_SOLVED:
        file.write_text("".join(json.dumps({"prompt": q, "answer": "x"}) + "\n" for q in questions))
        return {"name": "rows", "train_file": str(file), "success": SOLVED}
    return {"name": chosen.name} | chosen.options | {"train_file": str(file), "test_file": str(file)}


@pytest.fixture
def environment_kept(monkeypatch, request):
    """Reward workers find light_rewards; DeepSpeed is told its rank in environment variables."""
    monkeypatch.syspath_prepend(str(request.path.parent))
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.usefixtures("environment_kept")
@pytest.mark.parametrize(
    "path", [pytest.param(p, marks=() if p.stem in QUICK else pytest.mark.slow, id=p.stem) for p in FILES]
)
def test_it_runs_with_a_tiny_model_of_the_family(path, tmp_path):
    assert_it_learns(shrunk(path, tmp_path), tmp_path)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("environment_kept")
def test_full_fine_tuning_runs_on_ray_with_zero_3(tmp_path, ray_cluster):
    config = shrunk(ROOT / "configs/methods/just_grpo_paper.yaml", tmp_path, ray=True)
    assert (config.cluster.kind, config.cluster.colocate, config.learner.zero_stage) == ("ray", True, 3)
    assert_it_learns(config, tmp_path)


def assert_it_learns(config, tmp_path):
    """Two steps, and something to learn in them."""
    assert train(config).steps == 2
    rows = map(json.loads, (tmp_path / config.run.name / "metrics.jsonl").read_text().splitlines())
    learned = [row for row in rows if "loss" in row]
    assert len(learned) == 2 and all(math.isfinite(row["loss"]) for row in learned)
    assert any(row["grad_norm"] > 0 for row in learned), "there was something to learn from"
