"""What a torch engine accepts as weights, and the strategies of its roles."""

from __future__ import annotations

import pytest
import torch

from dllm_rl.conformance import cases
from dllm_rl.errors import UnknownWeight
from dllm_rl.protocols.engine import EngineSetup, SharedModel, TensorSpec
from dllm_rl.types import Prompt, Sampling
from rollouts.native import NativeEngine

NORM = "model.norm.weight"
PROMPT = Prompt(uid="p", token_ids=(5, 6), text="", answer="", task="")


def setup(**options):
    return EngineSetup(
        rank=3,
        path="",
        strategies={"train": {"name": "low_confidence"}, "evaluate": {"name": "left_to_right"}},
        trains=frozenset({"model"}),
        load=lambda: (cases.denoiser("tiny"), cases.tokenizer()),
        **options,
    )


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            TensorSpec("lora.a", (3, 5), torch.float32),
            "engine 3 has no weight 'lora.a'; it has model.embed_tokens.weight,",
        ),
        (TensorSpec(NORM, (5,), torch.float32), r"is \(32,\) torch.float32, it was offered \(5,\) torch.float32"),
        (TensorSpec(NORM, (32,), torch.bfloat16), r"is \(32,\) torch.float32, it was offered \(32,\) torch.bfloat16"),
    ],
)
def test_weights_that_do_not_fit_are_refused(spec, message):
    with pytest.raises(UnknownWeight, match=message):
        NativeEngine(NativeEngine.Config(), setup()).begin_weights([spec])


def test_roles_have_strategies_of_their_own_and_experts_join_in():
    engine, sampling = NativeEngine(NativeEngine.Config(), setup()), Sampling(max_new_tokens=8, temperature=0.0)
    order = {}
    for role in ("train", "evaluate", {"name": "confidence_threshold", "threshold": 0.01}):
        (trajectory,) = engine.generate([PROMPT], sampling, seed=0, role=role)
        order[str(role)] = trajectory.unmask_step[2:].tolist()
    assert order["evaluate"] == list(range(8)) != order["train"]
    assert set(order.popitem()[1]) == {0}, "everything at once"


def test_an_engine_in_the_learners_process_decodes_with_the_learners_tensors():
    denoiser = cases.denoiser("tiny")
    strategies = NativeEngine(NativeEngine.Config(), setup())
    shared = SharedModel(
        denoiser=denoiser,
        tokenizer=cases.tokenizer(),
        strategies={role: sampler._strategy for role, sampler in strategies._samplers.items()},
    )
    engine = NativeEngine(NativeEngine.Config(), setup(shared=shared))
    assert engine.shares_weights and engine.denoiser is denoiser and not strategies.shares_weights
    assert denoiser.module.model.norm.weight.requires_grad, "the learner trains it"
