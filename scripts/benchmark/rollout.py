"""Speed of the native engine against the oracle on a tiny random model, and the share of time spent in the network.

    python scripts/benchmark/rollout.py [--family sdar --rows 256 --tokens-per-step 4 1]

Compare ratios within one run; absolute figures depend on the machine and on what else it does.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch

from dllm_rl.models.create import create_denoiser
from dllm_rl.models.tokenizers import character_tokenizer
from dllm_rl.protocols.denoiser import Denoiser
from dllm_rl.seeding import generator_for
from dllm_rl.types import Prompt, Sampling, Trajectory, WeightsVersion
from rollouts.native import NativeSampler
from rollouts.reference import ReferenceSampler
from rollouts.strategies.low_confidence import LowConfidence

SAMPLES_PER_PROMPT = 16


class Timed:
    """A denoiser that adds up the time spent inside it and counts its forwards."""

    def __init__(self, denoiser: Denoiser) -> None:
        self._denoiser = denoiser
        self.seconds, self.forwards = 0.0, 0

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._denoiser, name)
        return self._timed(name, value) if name in ("hidden_states", "unembed", "prefill", "extend") else value

    def _timed(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self._wait()
            started = time.perf_counter()
            result = method(*args, **kwargs)
            self._wait()
            self.seconds += time.perf_counter() - started
            self.forwards += name in ("hidden_states", "extend")
            return result

        return call

    def _wait(self) -> None:
        if self._denoiser.device.type == "cuda":
            torch.cuda.synchronize()


def measure(
    engine_class: type[NativeSampler] | type[ReferenceSampler],
    denoiser: Denoiser,
    prompts: list[Prompt],
    sampling: Sampling,
    samples_per_prompt: int,
) -> tuple[float, list[Trajectory]]:
    """Print one line; return decoded tokens per second and the rows."""
    timed = Timed(denoiser)
    engine = engine_class(timed, LowConfidence(None), weights=WeightsVersion(step=0, digest=""))
    engine.generate(prompts[:1], sampling, seed=1)  # warm-up
    timed.seconds, timed.forwards = 0.0, 0
    started = time.perf_counter()
    rows = engine.generate(prompts, sampling, seed=0, samples_per_prompt=samples_per_prompt)
    seconds = time.perf_counter() - started
    tokens = sum(len(row.events) for row in rows)
    print(
        f"  {engine_class.__name__:16} {len(rows):5} rows {tokens / seconds:9.0f} tokens/s {timed.forwards:6} forwards "
        f"{seconds:7.2f} s, {timed.seconds / seconds:6.1%} of it in the network"
    )
    return tokens / seconds, rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", default="tiny")
    parser.add_argument("--hidden-size", type=int, default=96)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--prompt", type=int, default=17, help="prompt tokens")
    parser.add_argument("--canvas", type=int, default=16, help="completion tokens")
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--tokens-per-step", type=int, nargs="+", default=[4, 1])
    parser.add_argument("--block-size", type=int, default=4, help="of block-causal families")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    denoiser = create_denoiser(
        a.family,
        character_tokenizer("123456789"),
        hidden_size=a.hidden_size,
        num_layers=a.layers,
        num_heads=4,
        max_length=a.prompt + a.canvas,
        block_size=a.block_size if a.family == "sdar" else None,
        seed=0,
        device=a.device,
    )
    draw = generator_for(0, "benchmark")
    clean = [token for token in range(denoiser.vocab_size) if token not in (denoiser.mask_id, *denoiser.end_ids)]
    prompts = [
        Prompt(
            uid=f"p{i}",
            token_ids=tuple(clean[j] for j in torch.randint(len(clean), (a.prompt,), generator=draw).tolist()),
            text="",
            answer="",
            task="",
        )
        for i in range(max(1, a.rows // SAMPLES_PER_PROMPT))
    ]
    print(f"{a.family}, d={a.hidden_size}, {a.layers} layers, V={denoiser.vocab_size}, prompt {a.prompt}, {a.device}")
    for tokens_per_step in a.tokens_per_step:
        sampling = Sampling(max_new_tokens=a.canvas, tokens_per_step=tokens_per_step)
        print(f"canvas {a.canvas}, {tokens_per_step} tokens per step")
        fast, rows = measure(NativeSampler, denoiser, prompts, sampling, SAMPLES_PER_PROMPT)
        slow, oracle = measure(ReferenceSampler, denoiser, prompts, sampling, 1)
        equal = all(
            torch.equal(mine.events, theirs.events)
            for mine, theirs in zip(rows[::SAMPLES_PER_PROMPT], oracle, strict=True)
        )
        print(f"  native / reference {fast / slow:.1f}x, same events: {equal}")


if __name__ == "__main__":
    main()
