"""The configurations for one card: headers that are what plan says, and two steps of each with a tiny model."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path

import pytest
import yaml

from dllm_rl.config.load import load_config
from dllm_rl.planning.memory import PHASES
from dllm_rl.train import train

ROOT = Path(__file__).resolve().parents[1]
FILES = {"lora_llada8b_24gb": 24.0, "lora_llada8b_80gb": 80.0}


@pytest.fixture(scope="module")
def headers():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "scripts/reproduce"))
        return importlib.import_module("plan_headers")


@pytest.mark.parametrize("name", FILES)
def test_headers_are_what_plan_says(name, headers):
    path = ROOT / f"configs/{name}.yaml"
    card = headers.FILES[path]
    plan = headers.planned(load_config(path), card)
    written = [line for line in path.read_text().splitlines() if line.startswith(headers.MARK)]
    assert written == headers.lines(plan, card), "run scripts/reproduce/plan_headers.py --write"
    assert all(len(line) <= 120 for line in written)
    assert plan.memory.peak / 1e9 < FILES[name] * 0.9, "it fits, with room for what is not counted"


def test_figures_by_hand(headers):
    """NF4 of 7 x 32 layers, the rest in bfloat16; an adapter of rank 128 on q, k, v and up in float32."""
    d, m, layers = 4096, 12288, 32
    plan = headers.planned(load_config(ROOT / "configs/lora_llada8b_24gb.yaml"), "rtx4090-24gb")
    matrices = [d * d] * 4 + [d * m] * 3
    adapter = layers * 128 * (3 * 2 * d + d + m)
    packed = layers * sum(n / 2 + n / 64 + 4 * n / (64 * 256) + 4 * (16 + 256 + 1) for n in matrices)
    rest = 2 * (2 * 126464 * d + (2 * layers + 1) * d) + 2 * 4 * 64  # embeddings, norms; the rotary frequencies twice
    assert plan.memory.states.trained == adapter
    assert plan.memory.states.weights == packed + rest + 4 * adapter
    assert plan.memory.states.moments == 8 * adapter + 4 * layers * 8
    (device,) = plan.memory.devices
    kept = [
        term
        for phase in PHASES
        for term in device.terms
        if term.name.startswith("activations") and phase in term.phases
    ]
    copies, length = plan.memory.batch.micro.number, 320 + 128
    inputs = layers * copies * length * d * 2  # one state a layer
    assert sum(term.bytes for term in kept) == pytest.approx(inputs, rel=0.15)


@pytest.mark.parametrize("name", FILES)
def test_a_tiny_twin_takes_two_steps(name, tmp_path):
    """The file itself, but for the model, the rows, what needs CUDA and the lengths that a laptop has time for."""
    questions = [
        {"question": f"What is {n} + {n}?", "answer": f"{n} and {n} are {2 * n}.\n#### {2 * n}"} for n in range(6)
    ]
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in questions))
    init = {"hidden_size": 128, "num_layers": 1, "num_heads": 4, "max_length": 512}
    # A random model is never right: a reward that some of its texts get stands beside the file's own.
    rewards = [*yaml.safe_load((ROOT / f"configs/{name}.yaml").read_text())["rewards"], {"name": "light_rewards:apart"}]
    twin = {
        "extends": str(ROOT / f"configs/{name}.yaml"),
        "run": {"steps": 2, "threads": 1, "output": str(tmp_path)},
        "model": {
            "path": None,
            "family": "llada",
            "quantize": None,
            "init": {**init, "tokenizer": "byte_bpe", "vocab_size": 300},
        },
        "data": {
            "prompts_per_step": 2,
            "samples_per_prompt": 3,
            "task": {"train_file": str(rows), "test_file": str(rows)},
        },
        "sampling": {"max_new_tokens": 32, "block_size": 16, "steps": 8},
        "rewards": rewards,
        "evaluate": {"limit": 2},
        "diagnostics": {"rows": 1},
    }
    (tmp_path / "twin.yaml").write_text(yaml.safe_dump(twin))
    config = load_config(tmp_path / "twin.yaml")
    assert config.model.lora.rank == 128 and config.model.gradient_checkpointing, "the rest is the file's"
    assert train(config).steps == 2
    learned = [json.loads(line) for line in (tmp_path / config.run.name / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in learned if "loss" in row]
    assert len(losses) == 2 and all(map(math.isfinite, losses))
    assert any(row.get("grad_norm", 0) > 0 for row in learned)


@pytest.fixture(autouse=True)
def rewards_found(monkeypatch, request):
    """Reward workers find light_rewards."""
    monkeypatch.syspath_prepend(str(request.path.parent))
