"""Keeps demonstrations no longer than what is decoded later: the length-aligned SFT of IGPO (arXiv:2509.10396).

    python scripts/recipes/length_aligned.py traces.jsonl aligned.jsonl --tokenizer GSAI-ML/LLaDA-8B-Instruct \
        --max-tokens 1024

A model that learnt from traces much longer than its canvas runs out of room in reinforcement learning. The paper has an
LLM rewrite long traces in concise form; what this leaves out is what would be rewritten (--rejected writes it).
Rows are JSON objects; the completion column is tokenised with the model's own tokenizer, with its end token.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from transformers import AutoTokenizer

from dllm_rl.cli.progress import RichProgress
from dllm_rl.tasks.files import field, read_rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Filter and report; 2 if the input cannot be used."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help=".jsonl, .json, .csv, gzipped or not, or .parquet")
    parser.add_argument("target", type=Path, help=".jsonl, made anew")
    parser.add_argument("--tokenizer", required=True, help="folder or hub name of the model")
    parser.add_argument("--max-tokens", type=int, required=True, help="the canvas of RL and evaluation")
    parser.add_argument("--min-tokens", type=int, default=1, help="shorter ones are left out as well")
    parser.add_argument("--column", default="completion", help="name of the completion column")
    parser.add_argument("--rejected", type=Path, help="write the rows that are left out there")
    options = parser.parse_args(arguments)
    if not 1 <= options.min_tokens <= options.max_tokens:
        parser.error(f"--min-tokens {options.min_tokens}, --max-tokens {options.max_tokens}: need 1 <= min <= max")
    if options.target.exists():
        parser.error(f"{options.target} is there already; remove it, or name another")
    try:
        rows = read_rows(str(options.source), None)
        texts = [str(field(row, options.column, where)) for where, row in rows]
        tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    except (ValueError, OSError) as error:
        print(f"error: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    lengths = []
    with RichProgress(Console(stderr=True)).track("tokenising", len(texts)) as advance:
        for text in texts:
            lengths.append(len(tokenizer.encode(text, add_special_tokens=False)) + 1)  # its end token
            advance(1, "")
    fits = [options.min_tokens <= length <= options.max_tokens for length in lengths]
    _write(options.target, [row for (_, row), ok in zip(rows, fits, strict=True) if ok])
    if options.rejected is not None:
        _write(options.rejected, [row for (_, row), ok in zip(rows, fits, strict=True) if not ok])
    ordered = sorted(lengths)
    quantiles = ", ".join(f"{share}%: {ordered[(len(ordered) - 1) * share // 100]}" for share in (10, 50, 90, 100))
    print(f"{sum(fits)} of {len(rows)} rows have {options.min_tokens} to {options.max_tokens} tokens: {options.target}")
    print(f"tokens per completion: {quantiles}")
    return 0


def _write(path: Path, rows: Sequence[object]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
