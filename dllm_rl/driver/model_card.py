"""The README.md of an export: what it is, what it was made from and how."""

from __future__ import annotations

from pathlib import Path

import yaml

import dllm_rl
from dllm_rl.config.load import dump
from dllm_rl.config.schema import Config
from dllm_rl.reports.run_folder import read_rows

_NOT_PUBLIC = ("provenance", "tracking")  # paths and names of a machine


def model_card(kind: str, base: str, run: Path | None, step: int | None, config: Config | None, command: str) -> str:
    """Markdown with the hub's metadata in front.

    Args:
        kind: "adapter", "merged" or "full".
        base: folder or hub name.
        run: run folder, if it is known.
        step: of the checkpoint, if it is known.
        config: of the run, if it is known.
        command: that made the export.
    """
    on_hub = not Path(base).exists()
    meta = {"library_name": "peft" if kind == "adapter" else "transformers", "tags": ["diffusion", "dllm-rl"]}
    if on_hub:
        meta["base_model"] = base
    what = {"adapter": "A LoRA adapter", "merged": "A model with its adapter merged", "full": "A model"}[kind]
    lines = [
        "---",
        yaml.safe_dump(meta, sort_keys=False).rstrip(),
        "---",
        "",
        f"# {'Export' if config is None else config.run.name}",
        "",
        f"{what}, trained with dllm-rl {dllm_rl.__version__}.",
        "",
        f"- base model: `{base}`" + ("" if on_hub else " (a local folder)"),
    ]
    if config is not None:
        rewards = "the task's own" if config.rewards is None else ", ".join(reward.name for reward in config.rewards)
        lines += [
            f"- method: `{config.algorithm.name}`",
            f"- data: task `{config.data.task.name}`",
            f"- rewards: {rewards}",
            f"- steps: {step} of {config.run.steps}, {config.data.prompts_per_step} prompts each",
        ]
    if command:
        lines.append(f"- exported by: `{command}`")
    metrics = _metrics(run, step)
    if metrics:
        lines += ["", "## Metrics", "", "| metric | value |", "|---|---|"]
        lines += [f"| {name} | {value:.4g} |" for name, value in metrics.items()]
    if config is not None:
        public = yaml.safe_load(dump(config))
        for name in _NOT_PUBLIC:
            public.pop(name, None)
        text = yaml.safe_dump(public, sort_keys=False, width=120)
        lines += ["", "## Configuration", "", "```yaml", text.rstrip(), "```"]
    return "\n".join(lines) + "\n"


def _metrics(run: Path | None, step: int | None) -> dict[str, float]:
    """The latest reward, loss and held-out figures up to a step."""
    found: dict[str, float] = {}
    if run is not None and step is not None and (run / "metrics.jsonl").is_file():
        for row in read_rows(run / "metrics.jsonl"):
            if row["step"] <= step:
                wanted = {k: v for k, v in row.items() if k in ("reward", "loss") or k.startswith("eval/")}
                found |= {k: v for k, v in wanted.items() if isinstance(v, int | float)}
    return found
