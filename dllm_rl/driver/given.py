"""Objects in the place of names: reward functions and rows of a Python program, kept in the run folder.

Reward workers are processes of their own and find a reward by "module:name". A function that has no such name (of a
notebook, of a script's __main__, a lambda) is pickled by value into a module below RUN/given, which workers import.
"""

from __future__ import annotations

import base64
import hashlib
import importlib
import importlib.util
import json
import os
import pickle
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import dill

from dllm_rl.config.schema import RewardPlugin
from dllm_rl.errors import UserError, first_line

Reward = str | Callable[..., Any] | RewardPlugin | Mapping[str, Any]
Rewards = Sequence[Reward]
Rows = str | Path | Iterable[Mapping[str, Any]]
_TASK = "rows"  # the task of rows


def with_given(
    values: Mapping[str, Any], *, rewards: Rewards | None, train: Rows | None, test: Rows | None
) -> dict[str, Any]:
    """Sections of a configuration that name the given objects.

    Args:
        values: sections, not validated yet.
        rewards: in the place of section rewards; None = as they are.
        train: rows in the place of the task's; None = as they are.
        test: the same, held out.
    Raises:
        UserError: a function that cannot be pickled, rows that JSON cannot hold, or none.
    """
    values = dict(values)
    run = values.get("run") or {}
    folder = Path(str(run.get("output", "runs"))) / str(run.get("name", "run")) / "given"
    if rewards is not None:
        if isinstance(rewards, str | Mapping) or callable(rewards):
            raise UserError("rewards: give a list of functions or names, also for a single one")
        values["rewards"] = [_reward(reward, folder) for reward in rewards]
        if any(callable(r) or (isinstance(r, Mapping) and callable(r.get("name"))) for r in rewards):
            values["reward_pool"] = {"self_test": 0, **(values.get("reward_pool") or {})}
    if train is None and test is None:
        return values
    data = dict(values.get("data") or {})
    task = dict(data.get("task") or {})
    if task.get("name") != _TASK:
        task = {"name": _TASK}
    if train is not None:
        task["train_file"] = _file(train, folder, "train")
    if test is not None:
        task["test_file"] = _file(test, folder, "test")
        task.setdefault("train_file", task["test_file"])
    if not task.get("success") and values.get("rewards"):
        task["success"] = values["rewards"][0]["name"]
    values["data"] = data | {"task": task}
    return values


def _reward(reward: Reward, folder: Path) -> dict[str, Any]:
    if isinstance(reward, RewardPlugin):
        return reward.model_dump()
    entry: dict[str, Any] = dict(reward) if isinstance(reward, Mapping) else {"name": reward}
    named = entry.get("name")
    if callable(named):
        entry["name"] = _name(named, folder)
    elif not isinstance(named, str):
        raise UserError(f"rewards: {reward!r:.60} is neither a function, nor a name, nor a mapping with 'name'")
    return entry


def _name(function: Callable[..., Any], folder: Path) -> str:
    """What another process finds a function under, "module:name"."""
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", "")
    known = isinstance(module, str) and getattr(sys.modules.get(module), name, None) is function
    if isinstance(module, str) and known and module != "__main__" and importlib.util.find_spec(module) is not None:
        return f"{module}:{name}"
    label = name.rpartition(".")[2]
    label = label if label.isidentifier() else "reward"  # <lambda>
    try:
        code = dill.dumps(function, recurse=True)
    except (pickle.PicklingError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"rewards: {label} cannot be sent to the reward workers ({first_line(error)}); move it into a file of its "
            f"own and import it"
        ) from error
    file = folder / f"given_{label}_{hashlib.blake2b(code, digest_size=4).hexdigest()}.py"
    text = base64.b64encode(code).decode()
    _write(
        file,
        f'"""The reward function {label}, as it was given to dllm_rl."""\n\nimport base64\n\nimport dill\n\n'
        f'{label} = dill.loads(base64.b64decode("{text}"))\n',
    )
    place = str(folder.absolute())
    if place not in sys.path:  # workers get our path
        sys.path.append(place)
    importlib.invalidate_caches()
    return f"{file.stem}:{label}"


def _file(rows: Rows, folder: Path, split: str) -> str:
    """A file of rows; one that is made is named by its content, so that no run loses what it was trained on."""
    if isinstance(rows, str | Path):
        return str(rows)
    lines = []
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, Mapping):
            raise UserError(f"dataset, row {number}: is {type(row).__name__}, expected a mapping of columns")
        try:
            lines.append(json.dumps(dict(row), ensure_ascii=False, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise UserError(
                f"dataset, row {number}: {first_line(error)}; columns must be text, numbers or lists"
            ) from None
    if not lines:
        raise UserError("dataset: holds no rows; a data set needs at least one")
    text = "\n".join(lines) + "\n"
    file = folder / f"{split}-{hashlib.blake2b(text.encode(), digest_size=4).hexdigest()}.jsonl"
    _write(file, text)
    return str(file)


def _write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, file)
