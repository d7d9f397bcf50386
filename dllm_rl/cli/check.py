"""dllm-rl check-plugin: hold plugins to their contracts and say which clause is broken, and how."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.markup import escape

from dllm_rl import registry
from dllm_rl.cli.output import write_json
from dllm_rl.conformance.suite import CHECKS, Finding, check_plugin
from dllm_rl.conformance.violation import NotCheckable
from dllm_rl.errors import UserError
from dllm_rl.registry import Kind


def run_checks(kind: str | None, name: str | None, options: Sequence[str], json_path: Path | None, quiet: bool) -> int:
    """Check one plugin, every plugin of a kind, or every registered plugin; returns the exit code.

    Raises:
        UserError: an unknown kind or plugin, or an option it does not take.
    """
    console = Console(soft_wrap=True, highlight=False)
    chosen = [_kind(kind)] if kind is not None else list(CHECKS)
    results: list[dict[str, Any]] = []
    unchecked: list[str] = []
    for one in chosen:
        for plugin in [name] if name is not None else registry.names(one):
            try:
                for finding in check_plugin(one, plugin, _options(options)):
                    results.append({"kind": one, "name": plugin, **asdict(finding)})
                    if finding.problem is not None or not quiet:
                        console.print(_line(f"{one}/{plugin}", finding))
            except NotCheckable as why:
                if name is not None:  # asked for by name
                    raise
                unchecked.append(plugin)
                console.print(f"[yellow]not checked[/] {why}")
    failed = sum(result["problem"] is not None for result in results)
    write_json(json_path, {"failed": failed, "not_checked": unchecked, "findings": results})
    console.print(f"{len(results) - failed} checks hold, {failed} fail, {len(unchecked)} plugins not checked")
    return 2 if failed else 0


def _line(label: str, finding: Finding) -> str:
    words = f"{label}: {finding.check.replace('_', ' ')}"
    if finding.problem is None:
        return f"[green]ok[/]   {words}"
    return f"[red]FAIL[/] {words}\n     the contract: {escape(finding.law)}\n     but: {escape(finding.problem)}"


def _kind(text: str) -> Kind:
    for kind in CHECKS:
        if text in (kind, kind[:-1], kind.removesuffix("ies") + "y"):
            return kind
    raise UserError(f"unknown kind '{text}'; one of {', '.join(CHECKS)}")


def _options(texts: Sequence[str]) -> dict[str, Any]:
    for text in texts:
        if "=" not in text:
            raise UserError(f"option '{text}': expected name=value")
    return {key: yaml.safe_load(value) for key, _, value in (text.partition("=") for text in texts)}
