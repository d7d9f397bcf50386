"""Peaks of the meta device against what autograd keeps of a real model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from dllm_rl import registry
from dllm_rl.config.load import load_config, validate
from dllm_rl.errors import UserError
from dllm_rl.models.create import create_denoiser
from dllm_rl.models.lora import add_lora
from dllm_rl.models.tokenizers import character_tokenizer
from dllm_rl.planning.dry_run import DryRun, Rows
from dllm_rl.planning.memory import memory_of
from dllm_rl.planning.model import planned_model
from dllm_rl.types import Sampling

PAPER = sorted((Path(__file__).resolve().parents[2] / "configs" / "methods").glob("*_paper.yaml"))
TOKENIZER = character_tokenizer("0123456789 ")
SIZES = {"hidden_size": 64, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2, "intermediate_size": 160}
LORA = {"rank": 4, "alpha": 8.0}
ROWS = Rows(number=6, length=48, scored=60)


def made(family, dtype=torch.float32, device="cpu"):
    size = 4 if registry.load("families", family).block_causal else None
    options = {**SIZES, "max_length": 128, "block_size": size, "seed": 0}
    return create_denoiser(family, TOKENIZER, **options, dtype=dtype, device=device)


def config(**changes):
    values = {
        "run": {"name": "a", "steps": 1},
        "model": {"path": "x"},
        "data": {"task": {"name": "sudoku4"}, "prompts_per_step": 4, "samples_per_prompt": 4},
        "sampling": {"max_new_tokens": 16},
        "algorithm": {"name": "diffu_grpo", "beta": 0.0},
    }
    return validate({**values, **{key: values.get(key, {}) | value for key, value in changes.items()}})


def kept_by_autograd(denoiser):
    """Bytes of the storages that the layers' graph refers to, weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in denoiser.module.parameters()}
    found, alive = {}, []

    def pack(value):
        alive.append(value)  # else another storage could get its address
        found[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        return value

    tokens = torch.ones(ROWS.number, ROWS.length, dtype=torch.int64)
    mask = torch.arange(ROWS.length).expand_as(tokens) > 4
    blocks = None if denoiser.block_size is None else torch.arange(ROWS.length).expand_as(tokens) // 4
    denoiser.module.train()
    with saved_tensors_hooks(pack, lambda value: value):
        denoiser.hidden_states(tokens, mask, tokens == 1, blocks)
    return sum(size for place, size in found.items() if place not in weights)


@pytest.mark.parametrize("family", registry.names("families"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_what_is_kept_for_the_backward_pass_is_what_autograd_keeps(family, dtype, lora):
    real, plan = made(family, dtype), made(family, dtype, "meta")
    for one in (real, plan) if lora else ():
        add_lora(one, **LORA, seed=0)
    peak = DryRun(plan, device="cpu").update(ROWS, passes=1)
    assert peak.kept == pytest.approx(kept_by_autograd(real), rel=0.05)
    assert peak.total > peak.kept + peak.gradients / 2


def test_a_second_micro_batch_comes_on_top_of_the_gradients_of_the_first():
    once, twice = (DryRun(made("tiny", device="meta"), device="cpu").update(ROWS, passes=n) for n in (1, 2))
    assert once.kept == pytest.approx(twice.kept, rel=0.01) and once.gradients == twice.gradients
    assert twice.total == pytest.approx(once.total + twice.gradients, rel=0.1)
    assert once.gradients == sum(p.numel() * 4 for p in made("tiny").module.parameters())


def test_layers_that_are_recomputed_keep_their_inputs_alone():
    whole, recomputed = made("tiny", device="meta"), made("tiny", device="meta")
    recomputed.module.gradient_checkpointing_enable()
    kept = [DryRun(one, device="cpu").update(ROWS, passes=1).kept for one in (whole, recomputed)]
    inputs = (SIZES["num_layers"] + 4) * ROWS.number * ROWS.length * SIZES["hidden_size"] * 4
    assert kept[1] <= inputs < kept[0] / 4


def test_logits_are_bounded_by_their_chunk():
    sizes = {**SIZES, "max_length": 128, "seed": 0}
    wide = create_denoiser("tiny", character_tokenizer("".join(map(chr, range(200, 20_000)))), **sizes, device="meta")
    peaks = [DryRun(wide, device="cuda").score(Rows(number=64, length=128, scored=n)).total for n in (3388, 8470)]
    assert peaks[1] < 1.1 * peaks[0], "2^25 logits at once at most"
    decoded = [
        DryRun(wide, device="cuda").decode(
            Rows(number=64, length=128, scored=8000), Sampling(max_new_tokens=64), chunk=n
        )
        for n in (100, 1000)
    ]
    assert decoded[1].total > 3 * decoded[0].total


def test_phases_hold_what_is_there_then():
    base = config()
    memory = memory_of(base, made("tiny", device="meta"), 22, device="cpu")
    (device,) = memory.devices
    assert memory.batch.rows == 16 and memory.batch.microbatches == 1
    assert device.of("step") >= sum(getattr(memory.states, n) for n in ("weights", "moments", "gradients"))
    small = memory_of(config(learner={"tokens_per_microbatch": 80}), made("tiny", device="meta"), 22, device="cpu")
    assert small.batch.microbatches == 8 and small.batch.micro.number == 2
    assert small.peak < memory.peak
    reference = memory_of(config(algorithm={"beta": 0.1}), made("tiny", device="meta"), 22, device="cpu")
    assert reference.devices[0].of("rollout") - device.of("rollout") == memory.states.weights


@pytest.mark.parametrize(
    ("colocate", "names"), [(False, ["learner rank", "engine"]), (True, ["learner rank and engine"])]
)
def test_devices_of_a_cluster(colocate, names):
    cluster = {"kind": "ray", "learners": 2, "engines": 2, "colocate": colocate}
    settings = config(cluster=cluster, learner={"backend": "deepspeed", "zero_stage": 2})
    memory = memory_of(settings, made("tiny", device="meta"), 22, device="cuda")
    assert [(d.name, d.count) for d in memory.devices] == [(name, 2) for name in names]
    own = [t for d in memory.devices for t in d.terms if t.name == "engine's weights"]
    assert [t.phases == {"rollout"} for t in own] == [colocate], "colocated engines sleep while learners work"
    one = config(learner={"backend": "deepspeed", "zero_stage": 2})
    whole = memory_of(one, made("tiny", device="meta"), 22, device="cuda").states
    assert memory.states.masters * 2 == pytest.approx(whole.masters, rel=0.01)


def test_processes_on_a_cpu_share_its_memory():
    settings = config(cluster={"kind": "ray", "engines": 3})
    by_kind = {k: memory_of(settings, made("tiny", device="meta"), 22, device=k) for k in ("cpu", "cuda")}
    learner, engine = by_kind["cpu"].devices
    assert by_kind["cpu"].peak == learner.peak + 3 * engine.peak
    assert by_kind["cuda"].peak == max(device.peak for device in by_kind["cuda"].devices)


def test_what_host_memory_holds():
    cluster = {"kind": "ray", "learners": 1, "engines": 2, "colocate": True}
    memory = memory_of(config(cluster=cluster), made("tiny", device="meta"), 22, device="cuda")
    weights = sum(p.numel() * 4 for p in made("tiny").module.parameters())
    assert memory.store == weights, "more engines than learners: the object store carries the weights"
    both, engine = memory.devices
    assert (both.name, engine.name) == ("learner rank and engine", "engine")
    assert [[t.name for t in one.host] for one in (both, engine)] == [["engine's weights, asleep"]] * 2
    adapter = config(cluster=cluster, model={"lora": LORA})
    assert memory_of(adapter, made("tiny", device="meta"), 22, device="cuda").store < weights / 4
    assert memory_of(config(), made("tiny", device="meta"), 22, device="cuda").store == 0


def test_keys_and_values_are_counted_once():
    settings = config(data={"prompts_per_step": 2, "samples_per_prompt": 2}, sampling={"max_new_tokens": 16})
    (device,) = memory_of(settings, made("sdar", device="meta"), 40, device="cpu").devices
    terms = {term.name: term.bytes for term in device.largest("rollout")}
    assert terms["keys and values"] == 2 * 3 * 4 * 2 * 120 * 16 * 4, "K and V, layers, rows, heads, room for 3 prompts"
    assert terms["a forward of a rollout, and its proposals"] < terms["keys and values"]


@pytest.mark.parametrize("path", PAPER, ids=lambda p: p.stem)
def test_every_method_can_be_planned(path):
    """At the canvas of the paper, with a narrow model of the family."""
    settings = load_config(path)
    if (lora := settings.model.lora) is not None:  # not above the width
        lora = lora.model_copy(update={"rank": min(lora.rank, 32)})
        settings = settings.model_copy(update={"model": settings.model.model_copy(update={"lora": lora})})
    family = {"GSAI-ML": "llada", "apple": "dream", "JetLM": "sdar"}[settings.model.path.split("/")[0]]
    memory = memory_of(settings, made(family, device="meta"), 100, device="cuda")
    assert all(term.bytes >= 0 for device in memory.devices for term in (*device.terms, *device.host))
    trained = memory.states.trained
    assert (trained == 0) == (settings.algorithm.name == "unmasking_policy")
    assert (memory.batch.microbatches > 0) == (trained > 0)
    assert all(
        device.of("update") > device.of("step") for device in memory.devices if trained and "learner" in device.name
    )


def test_a_network_that_looks_at_values_is_refused_by_name():
    denoiser = made("tiny", device="meta")
    denoiser.module.base_model.norm.register_forward_hook(lambda module, inputs, output: output.nonzero())
    with pytest.raises(UserError, match="'tiny': a dry run raised NotImplementedError"):
        DryRun(denoiser, device="cpu").score(ROWS)


def test_the_adapter_of_the_plan_is_that_of_the_run():
    settings = config(model={"lora": LORA})
    real = made("dream")
    add_lora(real, **LORA, seed=0)
    names = [(name, p.shape, p.requires_grad) for name, p in real.module.named_parameters()]
    plan = planned_model(made("dream", device="meta"), settings).module.named_parameters()
    assert names == [(name, p.shape, p.requires_grad) for name, p in plan]
