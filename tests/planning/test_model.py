"""Bytes that are computed from shapes, against the tensors of real models after an optimiser step."""

from __future__ import annotations

import json
import os
import socket

import pytest
import torch
import torch.multiprocessing as multiprocessing
from bitsandbytes.nn import Linear4bit

from dllm_rl import registry
from dllm_rl.config.cluster import LearnerSection
from dllm_rl.config.load import validate
from dllm_rl.errors import UserError
from dllm_rl.learner.optimizer import Optimizer
from dllm_rl.models.cache import BlockCache
from dllm_rl.models.create import create_denoiser
from dllm_rl.models.lora import add_lora, add_second_adapter
from dllm_rl.models.quantize import quantize
from dllm_rl.models.tokenizers import character_tokenizer
from dllm_rl.planning.model import adapted, cache_bytes, nf4_bytes, planned_model, states_of, weight_bytes

TOKENIZER = character_tokenizer("0123456789 ")
SIZES = {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "intermediate_size": 128}
LORA = {"rank": 4, "alpha": 8.0}


def made(family, dtype=torch.float32, device="cpu"):
    size = 4 if registry.load("families", family).block_causal else None
    options = {**SIZES, "max_length": 32, "block_size": size, "seed": 0}
    return create_denoiser(family, TOKENIZER, **options, dtype=dtype, device=device)


def config(*, lora=False, dtype="float32", quantize=None, **learner):
    model = {"path": "x", "dtype": dtype, "lora": LORA if lora else None, "quantize": quantize}
    return validate(
        {
            "run": {"name": "a", "steps": 1},
            "model": model,
            "data": {"task": {"name": "sudoku4"}},
            "algorithm": {"name": "diffu_grpo", "beta": 0.1},
            "learner": learner,
            "cluster": {"kind": "ray" if learner.get("backend") else "local"},
        }
    )


def nbytes(tensors):
    return sum(t.untyped_storage().nbytes() for t in tensors)


def held(denoiser):
    module = denoiser.module
    return nbytes({id(t): t for t in (*module.parameters(), *module.buffers())}.values())


@pytest.mark.parametrize("family", registry.names("families"))
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("masters", ["float32", "stochastic_rounding"])
def test_states_are_those_of_the_torch_learner(family, lora, dtype, masters):
    settings = config(lora=lora, dtype=dtype, master_weights=masters, reference={"kind": "ema"})
    real = made(family, getattr(torch, dtype))
    plan = states_of(planned_model(made(family, device="meta"), settings), settings)
    if lora:
        add_lora(real, **LORA, seed=0)
    trained = [p for p in real.module.parameters() if p.requires_grad]
    optimizer = Optimizer(trained, settings.learner, 1)
    sum(p.float().square().sum() for p in trained).backward()
    assert plan.gradients == nbytes(optimizer._masters.gradients())
    optimizer.start(0)
    optimizer.step(lambda norm: None)
    assert plan.trained == sum(p.numel() for p in trained)
    assert plan.weights == held(real)
    assert plan.masters == nbytes(t for t in optimizer.state_dict()["masters"] if t is not None)
    assert plan.moments == nbytes(t for state in optimizer._adam.state.values() for t in state.values())
    if lora:
        pairs = add_second_adapter(real)
        assert plan.second_adapter == nbytes(t for own, _ in pairs for t in own)


@pytest.mark.parametrize("family", registry.names("families"))
def test_four_bits_are_those_of_bitsandbytes(family):
    real, settings = made(family, torch.bfloat16), config(lora=True, dtype="bfloat16", quantize="nf4")
    quantize(real, torch.device("cpu"))
    layers = [layer for layer in real.module.modules() if isinstance(layer, Linear4bit)]
    tables = 0
    for layer in layers:
        state, second = layer.weight.quant_state, layer.weight.quant_state.state2
        parts = (state.absmax, state.code, state.offset, second.absmax, second.code)
        tables += sum(t.numel() * t.itemsize for t in parts)
        assert nf4_bytes(layer.in_features * layer.out_features) == layer.weight.numel() + sum(
            t.numel() * t.itemsize for t in parts
        )
    packed = sum(p.numel() * p.itemsize for p in (*real.module.parameters(), *real.module.buffers()))
    plain = planned_model(made(family, device="meta"), config(dtype="bfloat16"))
    assert weight_bytes(plain, quantized=True) == packed + tables
    adapter = states_of(planned_model(made(family, device="meta"), settings), settings)
    assert adapter.weights - adapter.gradients == packed + tables, "an adapter in float32 on top"


def test_what_an_adapter_matches_is_counted_in_the_familys_words():
    settings = config(lora=True)
    found = adapted(planned_model(made("llada", device="meta"), settings))
    assert set(found) == {"q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj", "ff_out"}
    assert found["q_proj"] == (2, 2 * 4 * (64 + 64)) and found["ff_out"] == (2, 2 * 4 * (128 + 64))
    wrong = settings.model_copy(
        update={
            "model": settings.model.model_copy(
                update={"lora": settings.model.lora.model_copy(update={"targets": ["x"]})}
            )
        }
    )
    with pytest.raises(UserError, match="'x' matches no module"):
        planned_model(made("llada", device="meta"), wrong)


@pytest.mark.parametrize(("prompt", "canvas", "block"), [(3, 8, 4), (20, 64, 4), (1, 96, 8)])
def test_the_cache_is_as_large_as_it_grows(prompt, canvas, block):
    cache, rows = BlockCache(2, torch.zeros(3, 0, dtype=torch.bool)), 3
    for width in (prompt, *[block] * (canvas // block)):
        window = torch.zeros(rows, 2, width, 16)
        for layer in range(2):
            cache.update(window, window, layer)
        cache.commit(torch.ones(rows, width, dtype=torch.bool))
    real = made("sdar")
    size = cache_bytes(real.module.config, rows, prompt, canvas, block, 4, 16)
    assert size == nbytes((*cache._keys, *cache._values))


def total_of_states(denoiser):
    tokens = torch.ones(1, 8, dtype=torch.int64)
    return denoiser.hidden_states(tokens, tokens == 1, tokens == 1).float().sum()


def in_a_rank(rank, size, port, folder):
    from dllm_rl.learner.zero import Root, ZeroOptimizer, join_ranks

    torch.set_num_threads(1)
    join_ranks(rank, size, "127.0.0.1", port)
    found = []
    for dtype in ("float32", "bfloat16"):
        for stage in (1, 2, 3):
            denoiser = made("tiny", getattr(torch, dtype))
            trained = list(denoiser.module.parameters())
            learner = LearnerSection(backend="deepspeed", zero_stage=stage)
            optimizer = ZeroOptimizer(Root(denoiser), trained, learner, 1)
            optimizer.start(0)
            states = optimizer.engine(total_of_states)
            optimizer.backward(states, last=True)
            optimizer.step(lambda norm: None)
            zero = optimizer.engine.optimizer
            # Three optimisers of DeepSpeed: in bfloat16, stage 1 has another than stage 2.
            names = ("fp32_partitioned_groups_flat", "fp32_groups_flat_partition", "single_partition_of_fp32_groups")
            copies = next(getattr(zero, name) for name in names if hasattr(zero, name))
            copies = [] if stage == 3 and dtype == "float32" else copies
            states = zero.optimizer.state.values()
            moments = sum(t.numel() * t.itemsize for state in states for t in state.values())
            found.append([dtype, stage, sum(t.numel() * t.itemsize for t in copies), moments])
    (folder / f"{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()
    os._exit(0)  # threads of several DeepSpeed engines in a process abort it at its end


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2])
def test_states_are_those_that_zero_shards(size, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    multiprocessing.spawn(in_a_rank, (size, port, tmp_path), nprocs=size)
    for rank in range(size):
        for dtype, stage, masters, moments in json.loads((tmp_path / f"{rank}.json").read_text()):
            settings = config(dtype=dtype, backend="deepspeed", zero_stage=stage)
            plan = states_of(planned_model(made("tiny", device="meta"), settings), settings, ranks=size)
            assert (plan.masters, plan.moments) == (masters, moments), (dtype, stage, rank)
