"""Checkpoints: complete or absent, never half-written, and refused by name when a byte has changed.

<run>/checkpoints/step-000040/
    model/          weights in the family's own layout (or the adapter), and the tokenizer
    optimizer.pt    optimiser state and step
    reference.pt    the reference policy, if it moves
    state.json      counters
    manifest.json   SHA-256 of every other file
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dllm_rl.errors import UserError
from dllm_rl.storage import files

_NAME = re.compile(r"step-(\d{6,})$")


def write(root: Path, step: int, state: Mapping[str, Any], fill: Callable[[Path], None], *, keep: int) -> Path:
    """Write a checkpoint atomically: temporary folder, fsync, manifest, rename.

    Args:
        root: the run's ``checkpoints`` folder.
        step: finished optimiser steps.
        state: JSON counters.
        fill: writes model and learner files into the folder it is given.
        keep: older checkpoints beyond this many are removed, after the new one is in place.
    Returns:
        the folder.
    Raises:
        UserError: the disk is full or refuses; the checkpoints that were there still are.
    """
    name = f"step-{step:06d}"
    known = names(root)
    hint = f"checkpoint {known[-1]} is whole: make room, then go on with --resume" if known else "make room"
    size = f" (the last one takes {_size(root / known[-1]) / 2**30:.2f} GiB)" if known else ""
    with files.explained(f"checkpoint {name} cannot be written{size}", root, hint):
        root.mkdir(parents=True, exist_ok=True)
        sweep(root)
        temporary = root / f".writing-{name}"
        temporary.mkdir()
        try:
            final = _write(temporary, root / name, {"step": step, **state}, fill)
        except Exception:  # what is there of it only takes room
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        for old in [old for old in names(root) if old != name][: 1 - keep or None]:
            files.remove_folder(root / old)
    return final


def _write(temporary: Path, final: Path, state: Mapping[str, Any], fill: Callable[[Path], None]) -> Path:
    fill(temporary)
    (temporary / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
    written = sorted(p for p in temporary.rglob("*") if p.is_file())
    manifest = {str(p.relative_to(temporary)): _digest(p) for p in written}
    (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    folders = [p for p in temporary.rglob("*") if p.is_dir()]
    for path in [*written, temporary / "manifest.json", *folders, temporary]:
        files.sync(path)
    if final.exists():  # the same step again after a resume: sweep() puts the old one back if the new one does not come
        stale = final.with_name(f".stale-{final.name}")
        final.rename(stale)
        temporary.rename(final)
        shutil.rmtree(stale)
    else:
        temporary.rename(final)
    files.sync(final.parent)
    return final


def sweep(root: Path) -> None:
    """Remove what writers left behind that were killed; a checkpoint whose successor never came is put back."""
    for rest in [*root.glob(".writing-*"), *root.glob(".removing-*")]:
        shutil.rmtree(rest)
    for stale in root.glob(".stale-*"):
        final = root / stale.name.removeprefix(".stale-")
        if final.exists():
            shutil.rmtree(stale)
        else:
            stale.rename(final)


def names(root: Path) -> list[str]:
    """Complete checkpoints, oldest first."""
    found = [(int(m.group(1)), p.name) for p in root.glob("step-*") if (m := _NAME.match(p.name))]
    return [name for _, name in sorted(found)]


def find(root: Path, name: str | None) -> Path:
    """A verified checkpoint: the named one, or the newest.

    Raises:
        UserError: there is none, or it is damaged (the file is named, and the checkpoint before it).
    """
    known = names(root)
    if not known:
        raise UserError(f"no checkpoint in '{root}'; start without --resume")
    if name is not None and name not in known:
        raise UserError(f"no checkpoint '{name}' in '{root}'; there are {', '.join(known)}")
    chosen = name or known[-1]
    problem = damage(root / chosen)
    if problem is not None:
        earlier = known[: known.index(chosen)]
        hint = f"to go on from the one before, use --from {earlier[-1]}" if earlier else "there is no earlier one"
        raise UserError(f"checkpoint '{root / chosen}' is damaged: {problem}; {hint}")
    return root / chosen


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint: the first file that is missing or differs from the manifest, or None."""
    manifest_path = folder / "manifest.json"
    if not manifest_path.is_file():
        return "manifest.json is missing"
    try:
        manifest: dict[str, str] = json.loads(manifest_path.read_text(encoding="utf-8"))
    except ValueError:  # also a cut UTF-8 character
        return "manifest.json is not JSON"
    if not isinstance(manifest, dict):
        return "manifest.json is not a mapping"
    for name, digest in manifest.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if _digest(path) != digest:
            return f"{name} has changed since it was written"
    return None


def step(folder: Path) -> int:
    """Finished optimiser steps of a checkpoint."""
    return int(folder.name.removeprefix("step-"))


def state(folder: Path) -> dict[str, Any]:
    """The counters of a checkpoint."""
    loaded: dict[str, Any] = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    return loaded


def _size(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
