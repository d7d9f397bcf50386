"""How a reward function is called and what it may return; runs in the worker.

A class is asked for one completion at a time, as text. A plain function, or an object that is called like one, is
called as TRL calls it: with all the completions of a prompt, by keyword, conversations as lists of messages.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import numbers
import struct
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from types import SimpleNamespace
from typing import Any

MAX_MESSAGE = 500  # characters of an exception that travel to the pool
Result = tuple[str, float | None, str]  # status, value, message


def takes_groups(plugin: Any) -> bool:
    """Whether a reward, as the registry gives it, scores the completions of a prompt together."""
    return not isinstance(plugin, type)


class Caller:
    """A reward function of the run, called in its own form."""

    def __init__(self, reward: Callable[..., Any], *, group: bool) -> None:
        """Look at what it takes.

        Args:
            reward: the function, or the instance of a class.
            group: whether it is called in TRL's form.
        """
        self._reward, self._by_keyword = reward, False
        if group:
            try:
                parameters = inspect.signature(reward).parameters
            except (TypeError, ValueError):  # built in
                return
            kinds = {p.kind for p in parameters.values()}
            own = [n for n, p in parameters.items() if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD][:2]
            # Two names of its own for prompts and completions: it can only be called by position.
            self._by_keyword = len(own) < 2 or bool({"completions", "completion_ids"} & set(parameters))
            self._names = None if inspect.Parameter.VAR_KEYWORD in kinds else set(parameters)

    def __call__(self, rows: Sequence[Mapping[str, Any]], step: int) -> list[Result]:
        """The results of rows that are scored together; a single one, "raised", if it raised.

        Args:
            rows: prompt, completion and columns; for TRL's form also messages (of the prompt) and completion_ids.
            step: of the run.
        """
        columns = {name: [row["columns"][name] for row in rows] for name in rows[0]["columns"]}
        try:
            if self._by_keyword:
                returned = self._reward(**self._keywords(rows, columns, step))
            else:
                returned = self._reward([row["prompt"] for row in rows], [row["completion"] for row in rows], **columns)
            if inspect.isawaitable(returned):
                returned = asyncio.run(_awaited(returned))
            values = list(islice(returned, len(rows) + 1)) if isinstance(returned, Iterable) else []
            if len(values) != len(rows):
                return [("error", None, _broken(returned, len(rows)))] * len(rows)
            return [_result(value, returned, len(rows)) for value in values]
        except BaseException as error:  # whatever it raises, SystemExit too, means that it failed, not 0
            return [("raised", None, _raised(error))]

    def _keywords(self, rows: Sequence[Mapping[str, Any]], columns: dict[str, Any], step: int) -> dict[str, Any]:
        chat = all(row["messages"] is not None for row in rows)
        said = [[{"role": "assistant", "content": r["completion"]}] if chat else r["completion"] for r in rows]
        given: dict[str, Any] = {
            "trainer_state": SimpleNamespace(global_step=step),
            "log_extra": lambda column, values: None,
            "log_metric": lambda name, value: None,
            "completion_ids": [row["completion_ids"] for row in rows],
            **columns,
            "prompts": [row["messages"] if chat else row["prompt"] for row in rows],
            "completions": said,
        }
        return given if self._names is None else {k: v for k, v in given.items() if k in self._names}


async def _awaited(value: Any) -> Any:
    return await value


def _result(value: Any, returned: Any, rows: int) -> Result:
    if value is None:
        return "ok", None, ""
    if not isinstance(value, numbers.Real) or not math.isfinite(value):
        return "error", None, _broken(returned, rows)
    try:
        struct.pack("<f", value)
    except (
        OverflowError,
        struct.error,
    ):  # 1e39: infinite in float32, in which rewards are added up ("f" is silent)
        return "error", None, f"{_broken(returned, rows)}; float32 ends at 3.4e38"
    return ("invalid" if getattr(value, "status", "ok") == "invalid" else "ok"), float(value), ""


def _broken(returned: Any, rows: int) -> str:
    text = f"__call__() must return one finite number or None per completion, returned {returned!r:.100}"
    return f"{text} for {'one' if rows == 1 else rows}"


def _raised(error: BaseException) -> str:
    """What was raised, and where in the user's file."""
    last = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__][-1:]
    where = f" ({last[0].filename}:{last[0].lineno})" if last else ""
    try:
        text = str(error)[:MAX_MESSAGE]
    except BaseException:
        text = "an error whose __str__ raises"
    return f"__call__() raised {type(error).__name__}: {text}{where}"
