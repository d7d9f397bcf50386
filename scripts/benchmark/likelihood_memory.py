"""Peak memory of the chunked likelihood against the version that builds (N, L, V), and the distance of their gradients.

    python scripts/benchmark/likelihood_memory.py [--rows 8 --length 512 --vocab 126464 --width 256]

Each version runs in a process of its own; growth is peak resident memory after forward and backward minus before.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from dllm_rl.diffusion.likelihood import token_logp
from dllm_rl.seeding import generator_for


def measure(version: str, rows: int, length: int, vocab: int, width: int, out: Path) -> None:
    """Run one version and print its peak growth and time."""
    torch.set_num_threads(1)
    generator = generator_for(0, "benchmark")
    hidden = torch.randn(rows, length, width, generator=generator, requires_grad=True)
    matrix = (torch.randn(vocab, width, generator=generator) / width**0.5).requires_grad_()
    targets = torch.randint(1, vocab, (rows, length), generator=generator)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    if version == "chunked":
        flat = hidden.flatten(0, 1)
        logp = token_logp(lambda h: h @ matrix.T, flat, targets.flatten(), vocab_size=vocab, mask_id=0)
    else:
        logits = (hidden @ matrix.T).index_fill(-1, torch.tensor([0]), float("-inf"))
        logp = logits.log_softmax(-1).gather(-1, targets[..., None]).flatten()
    (-logp.mean()).backward()
    seconds = time.perf_counter() - started
    growth = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    torch.save({"growth_mib": growth, "seconds": seconds, "gradients": [hidden.grad, matrix.grad]}, out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=126_464)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--version", choices=["chunked", "whole"], help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.version:
        measure(a.version, a.rows, a.length, a.vocab, a.width, a.out)
        return
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for version in ("whole", "chunked"):
            out = Path(folder) / version
            size = [f"--{k}={getattr(a, k)}" for k in ("rows", "length", "vocab", "width")]
            subprocess.run([sys.executable, __file__, f"--version={version}", f"--out={out}", *size], check=True)
            results[version] = torch.load(out)
    print(f"N={a.rows} L={a.length} V={a.vocab} d={a.width}, float32, one thread")
    for version, label in (("whole", "builds (N, L, V)"), ("chunked", "chunked, recomputed")):
        r = results[version]
        print(f"{label:20}  peak growth {r['growth_mib']:8.0f} MiB   forward + backward {r['seconds']:6.1f} s")
    print(f"memory ratio {results['chunked']['growth_mib'] / results['whole']['growth_mib']:.3f}")
    for name, mine, theirs in zip(
        ("hidden", "matrix"), results["chunked"]["gradients"], results["whole"]["gradients"], strict=True
    ):
        relative = ((mine - theirs).norm() / theirs.norm()).item()
        print(f"gradient of {name}: relative difference {relative:.2e}")


if __name__ == "__main__":
    main()
