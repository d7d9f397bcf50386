"""Whether an engine can do what a run asks for, said before any engine is made."""

from __future__ import annotations

import dataclasses

import torch

from dllm_rl.config.schema import Config
from dllm_rl.errors import UserError
from dllm_rl.models.denoiser import TransformersDenoiser
from dllm_rl.protocols.algorithm import Algorithm
from dllm_rl.protocols.engine import Capabilities
from dllm_rl.types import Sampling


def check_engine(
    config: Config,
    algorithm: Algorithm,
    denoiser: TransformersDenoiser,
    capabilities: Capabilities,
    sampling: Sampling,
) -> None:
    """Compare a plan with the engine's capabilities.

    Args:
        config: of the run.
        algorithm: the method.
        denoiser: the model, for its family and attention; weights are not looked at.
        capabilities: of the engine with its options.
        sampling: decoding while training.
    Raises:
        UserError: naming the engine, what it lacks and what to change.
    """
    can, name, family = capabilities, config.engine.name, denoiser.family.name
    attention = "full" if denoiser.block_size is None else "block_causal"
    method, train = config.algorithm.name, algorithm.needs.source == "rollouts"
    adapter = config.model.lora is not None and config.cluster.push == "adapter" and "model" in algorithm.needs.trains
    gpus = torch.cuda.is_available() or config.cluster.kind == "ray"  # a driver of a cluster may have none itself
    lacks = [
        (can.families is not None and family not in can.families, f"serves {_listed(can.families)}, not '{family}'"),
        (
            attention not in can.attention,
            f"serves {_listed(can.attention)} attention, family '{family}' has {attention}",
        ),
        (can.needs_gpu and not gpus, "needs a GPU, and there is none"),
        (adapter and not can.lora, "knows no adapters; set cluster.push: merged"),
        (train and algorithm.needs.trajectory and not can.step_maps, f"returns no step maps, which '{method}' reads"),
        (
            config.rollout.correction is not None and not can.logp,
            "returns no log-probs, which rollout.correction reads",
        ),
        (config.drift.confidence is not None and not can.logp, "returns no log-probs, which drift.confidence reads"),
        (
            config.rollout.correction is not None and not sampling.plain and not can.sampled_logp,
            "does not tell how probable a token was under sampling.temperature, top_k and top_p, which "
            "rollout.correction reads; set temperature: 1.0 without them",
        ),
        (
            "policy" in algorithm.needs.trains and not can.confidence,
            f"keeps no confidences, which '{method}' trains on",
        ),
        (config.rollout.pause_blocks is not None and not can.partial, "cannot pause; leave rollout.pause_blocks out"),
        (bool(config.cluster.sleep) and not can.sleep, "cannot sleep; set cluster.sleep: false"),
    ]
    known = {"max_new_tokens", "block_size", "tokens_per_step", "temperature", "top_k", "top_p"} | can.sampling
    for field in dataclasses.fields(Sampling):
        asked = field.name not in known and getattr(sampling, field.name) != field.default
        lacks.append((asked, f"does not follow sampling.{field.name} = {getattr(sampling, field.name)}; leave it out"))
    for missing, what in lacks:
        if missing:
            raise UserError(f"engine '{name}' {what}; or set another engine.name, such as native")


def _listed(names: frozenset[str] | None) -> str:
    return ", ".join(sorted(names or ()))
