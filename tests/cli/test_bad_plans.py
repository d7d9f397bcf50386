"""Algorithms, strategies and data that cannot work together: refused before anything starts, exit code 2."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from rollouts.policy_network import UnmaskingPolicy, save_policy


def rows(path: Path, *lines: Any) -> str:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return str(path)


def jsonl(path: str, **more: Any) -> dict[str, Any]:
    """Changes that train on the user's own rows with a reward that any text gets."""
    return {
        "data.task": {"name": "rows", "train_file": path, "success": "format"},
        "model.init.tokenizer": "byte_bpe",
        "model.init.vocab_size": 300,
        "model.init.max_length": 64,
        "rewards": [{"name": "format", "pattern": "."}],
        **more,
    }


def revising_strategy(folder):
    """The place of a strategy that says that it changes its mind."""
    (folder / "undecided.py").write_text(
        "from rollouts.strategies.low_confidence import LowConfidence\n\n"
        "class Undecided(LowConfidence):\n    revises = True\n"
    )
    sys.path.insert(0, str(folder))
    return "undecided:Undecided"


def tensors(path):
    save_file({"a": torch.zeros(2)}, path)
    return path


def foreign_policy(folder):
    save_policy(UnmaskingPolicy(width=16), folder, {"vocabulary": "00000000"})
    return folder


# name: (changes of the configuration, or a function of tmp_path that makes the files they need and returns them;
#        words of the message)
PLANS: dict[str, tuple[dict[str, Any] | Callable[[Path], dict[str, Any]], list[str]]] = {
    "token weights of a sequence-level method": (
        {"rollout.correction": "token", "rollout.max_staleness": 1, "algorithm": {"name": "espo"}},
        ["rollout.correction = token", "'espo' has one advantage per row; set rollout.correction: sequence"],
    ),
    "a correction of guided tokens": (
        {"rollout.correction": "token", "rollout.max_staleness": 1, "sampling.cfg_scale": 0.5},
        ["rollout.correction = token", "sampling.cfg_scale guides tokens", "set sampling.temperature: 1.0"],
    ),
    "a correction of greedy tokens": (
        {"rollout.correction": "token", "rollout.max_staleness": 1, "sampling.temperature": 0},
        ["temperature = 0"],
    ),
    "a teacher in the place of a start that moves": (
        {
            "model.teacher": {"path": "somewhere"},
            "learner.reference": {"kind": "ema"},
            "algorithm": {"name": "diffu_grpo", "beta": 0.1},
        },
        ["learner.reference.kind = ema moves the start of the run", "model.teacher takes its place"],
    ),
    "a teacher that nobody reads": (
        {"model.teacher": {"path": "somewhere"}, "algorithm": {"name": "wd1"}},
        ["model.teacher is the reference of a run, and algorithm 'wd1' reads none"],
    ),
    "a teacher without draws for a method that reads each": (
        {"model.teacher": {"path": "x", "autoregressive": True}, "algorithm": {"name": "mdpo", "beta": 0.1}},
        ["model.teacher.autoregressive: algorithm 'mdpo' reads the log-probabilities of each draw"],
    ),
    "several engines in one process": (
        {"cluster.engines": 2},
        ["cluster.engines = 2 and cluster.learners = 1 need cluster.kind: ray"],
    ),
    "4-bit weights on a CPU": (
        {"model.quantize": "nf4", "model.lora": {"rank": 2}},
        ["model.quantize = nf4 needs a CUDA device", "'cpu'"],
    ),
    "4-bit weights that nothing is trained above": (
        {"model.quantize": "nf4"},
        ["model.quantize = nf4", "add model.lora"],
    ),
    "4-bit weights that are to be sent whole": (
        {"model.quantize": "nf4", "model.lora": {"rank": 2}, "cluster.push": "merged"},
        ["cluster.push: merged", "cluster.push: adapter"],
    ),
    "4-bit weights that are to be sharded": (
        {
            **{"model.quantize": "nf4", "model.lora": {"rank": 2}},
            "cluster": {"kind": "ray", "learners": 2},
            "learner": {"backend": "deepspeed", "zero_stage": 3},
        },
        ["learner.zero_stage = 3", "4-bit", "learner.zero_stage: 2"],
    ),
    "engines that are to sleep while they work": (
        {"cluster": {"kind": "ray", "colocate": True, "sleep": True}, "rollout.max_staleness": 1},
        ["cluster.sleep: true", "rollout.max_staleness: 0"],
    ),
    "a ZeRO option that DeepSpeed does not know": (
        {"learner.backend": "deepspeed", "learner.zero_options": {"stage3_prefetch": 1}},
        ["learner.zero_options: stage3_prefetch", "not permitted"],
    ),
    "a ZeRO option under a name of its own": (
        {"learner.backend": "deepspeed", "learner.zero_options": {"stage": 3}},
        ["learner.zero_options: 'stage'", "set learner.zero_stage"],
    ),
    "ZeRO options of the other learner": (
        {"learner.zero_options": {"reduce_bucket_size": 1000}},
        ["learner.zero_options needs learner.backend: deepspeed"],
    ),
    "several torch learners": (
        {"cluster": {"kind": "ray", "learners": 2}},
        ["cluster.learners = 2 needs learner.backend: deepspeed"],
    ),
    "weights that are sharded under the engine": (
        {"learner.backend": "deepspeed", "learner.zero_stage": 3},
        ["learner.zero_stage = 3", "cluster.kind: ray"],
    ),
    "parameters offloaded that are not sharded": (
        {"learner.backend": "deepspeed", "learner.offload_parameters": True},
        ["learner.offload_parameters needs learner.zero_stage: 3, it is"],
    ),
    "completions that pause for weights that wait for them": (
        {"rollout.pause_blocks": 1},
        ["rollout.pause_blocks = 1", "set cluster.kind: ray and rollout.max_staleness: 1 or more"],
    ),
    "a quadrature that has no table": (
        {"algorithm": {"name": "gdpo", "nodes": 6}},
        ["algorithm.nodes = 6: must be 1..5"],
    ),
    "hints without a trace": (
        {"algorithm": {"name": "igpo"}, "data.task": {"name": "countdown", "train_puzzles": 8, "test_puzzles": 4}},
        ["'igpo' cuts hints from a reference trace", "of task 'countdown' has none"],
    ),
    "hints without room": (
        {"algorithm": {"name": "igpo"}},
        ["algorithm.reserve = 30", "sampling.max_new_tokens = 16"],
    ),
    "left-to-right likelihoods of other rollouts": (
        {"algorithm": {"name": "just_grpo"}},
        ["just_grpo", "sampling.strategy.name=left_to_right"],
    ),
    "left-to-right likelihoods of rollouts that commit several tokens now and then": (
        {
            "algorithm": {"name": "just_grpo"},
            "sampling.strategy": {"name": "left_to_right"},
            "sampling.schedule": "timesteps",
        },
        ["just_grpo", "sampling.schedule=static"],
    ),
    "steps that do not divide over blocks": (
        {"sampling.block_size": 4, "sampling.tokens_per_step": 1, "sampling.steps": 6},
        ["sampling.steps = 6 do not divide over 16 tokens in blocks of 4", "set a multiple of 4"],
    ),
    "a replay of a strategy that revises": (
        lambda tmp: {"sampling.strategy": {"name": revising_strategy(tmp)}},
        ["'trace_rl' replays trajectories", "revises committed tokens"],
    ),
    "references of rollouts beforehand": (
        {"algorithm": {"name": "coupled_grpo"}, "learner.precompute_reference": True},
        ["precompute_reference = true", "'coupled_grpo' trains on fresh rollouts"],
    ),
    "references beforehand of a reference that moves": (
        {
            "algorithm": {"name": "vrpo"},
            "learner": {"precompute_reference": True, "reference": {"kind": "ema"}},
        },
        ["learner.precompute_reference", "does not move", "set learner.reference.kind: frozen"],
    ),
    "a reference that moves, and nobody reads": (
        {"algorithm": {"name": "coupled_grpo", "beta": 0.0}, "learner.reference": {"kind": "ema"}},
        ["learner.reference.kind = ema", "'coupled_grpo' reads no reference", "beta > 0"],
    ),
    "moves of a reference that is frozen": (
        {"algorithm": {"name": "coupled_grpo"}, "learner.reference": {"every": 32}},
        ["every = 32 and weight = 0.6", "frozen", "add kind: ema"],
    ),
    "a policy to train, but a strategy without one": (
        {"algorithm": {"name": "unmasking_policy"}},
        ["'unmasking_policy' trains the network", "sampling.strategy to {name: learned}"],
    ),
    "a policy among sampled tokens": (
        {"algorithm": {"name": "unmasking_policy"}, "sampling.strategy": {"name": "learned"}},
        ["sampling.temperature = 1.0", "set sampling.temperature to 0"],
    ),
    "an expert whose blocks do not fit": (
        {
            "algorithm": {"name": "unmasking_policy", "experts": [0.9], "expert_block_size": 5},
            "sampling.strategy": {"name": "learned"},
            "sampling.temperature": 0.0,
        },
        ["expert_block_size = 5", "must divide the decoding block of 16"],
    ),
    "no policy file": (
        {"sampling.strategy": {"name": "learned", "path": "/nowhere/p"}},
        ["/nowhere/p", "not there", "policy.safetensors"],
    ),
    "a policy file that is none": (
        lambda tmp: {"sampling.strategy": {"name": "learned", "path": str(tensors(tmp / "p.safetensors"))}},
        ["p.safetensors", "not an unmasking policy"],
    ),
    "a broken policy file": (
        lambda tmp: {"sampling.strategy": {"name": "learned", "path": rows(tmp / "p.safetensors", "x")}},
        ["p.safetensors", "cannot be read"],
    ),
    "a policy of another vocabulary": (
        lambda tmp: {"sampling.strategy": {"name": "learned", "path": str(foreign_policy(tmp))}},
        ["another vocabulary", "any_vocabulary: true"],
    ),
    "an untrained policy for a model that learns": (
        {"sampling.strategy": {"name": "learned"}},
        ["strategy 'learned' has no path", "unmasking_policy"],
    ),
    "preferences without pairs": (
        lambda tmp: jsonl(rows(tmp / "a.jsonl", {"prompt": "a", "answer": "x"}), algorithm={"name": "vrpo"}),
        ["a.jsonl-0", "not a preference pair"],
    ),
    "a pair of equals": (
        lambda tmp: jsonl(
            rows(
                tmp / "a.jsonl",
                {"prompt": "a", "chosen": "x", "rejected": "y"},
                {"prompt": "b", "chosen": "x", "rejected": "x"},
            ),
            algorithm={"name": "vrpo"},
        ),
        ["a.jsonl-1", "are the same", "remove the row"],
    ),
}


@pytest.mark.parametrize("case", PLANS)
def test_plans(case, write, tmp_path, refuse):
    changes, words = PLANS[case]
    config = write(changes(tmp_path) if callable(changes) else changes)
    refuse(["train", str(config), "--quiet"], words)
    assert not (tmp_path / "runs" / "run" / "metrics.jsonl").exists(), "a refused run must leave room for the next"
