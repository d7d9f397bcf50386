"""Errors: what a user can fix, runs that stop themselves, and packages that only some runs need."""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import ClassVar, Literal

# What to make smaller when memory runs out there; docs/memory.md has the terms of each phase.
_SMALLER = {
    "loading": "set model.dtype: bfloat16, model.lora with model.quantize: nf4, or more learner ranks",
    "rollout": "lower engine.max_batch_tokens, rollout.rows_per_call or sampling.max_new_tokens",
    "scoring": "lower learner.tokens_per_microbatch",
    "update": "lower learner.tokens_per_microbatch, or set model.gradient_checkpointing: true",
    "optimiser step": "set model.lora, learner.master_weights: stochastic_rounding, or learner.backend: deepspeed with "
    "offload_optimizer: true",
}


class UserError(ValueError):
    """A configuration, file or plugin that the user can put right; its message says how, in one line (exit code 2)."""


class RunStopped(RuntimeError):
    """A run that cannot go on and knows why; its message says what to do next, in one line (exit code 1).

    Attributes:
        exit_code: of the command.
    """

    exit_code: ClassVar[int] = 1


class Drifted(RunStopped):
    """A run that went beyond a limit of its section drift, and has saved a checkpoint (exit code 3)."""

    exit_code = 3


class OutOfMemory(RunStopped):
    """Memory ran out in a phase of which it is known what to make smaller."""


class PushError(RunStopped):
    """A push of weights that did not arrive as it was sent."""


class DroppedBucket(PushError):
    """Weights were announced and did not come."""


class StaleVersion(PushError):
    """Older weights than those that are there."""


class UnknownWeight(PushError):
    """A name or a shape that the receiver does not have."""


class DigestMismatch(PushError):
    """The receiver holds other values than the sender."""


class PushTimeout(PushError):
    """A worker did not finish its part in time."""


def nearest(name: str, known: Iterable[str], *, where: str = "", list_known: bool = True) -> str:
    """A hint for an unknown name: "; nearest is 'x'", or else what is known.

    Args:
        name: the unknown one.
        known: the right ones.
        where: put before each of them, "learner." for example.
        list_known: say all of them if none is near; else nothing.
    """
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if near:
        return f"; nearest is '{where}{near[0]}'"
    return f"; known: {', '.join(where + one for one in known) or 'none'}" if list_known else ""


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an exception says that memory ran out: of torch on any device, of Python, of numpy, of Ray's monitor."""
    # By name: this module is imported where torch and Ray are not. On the CPU torch has no class for it.
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    if named or error is None or isinstance(error, UserError):
        return named
    return any(words in str(error) for words in ("DefaultCPUAllocator: ", "Cannot allocate memory"))


@contextmanager
def memory_for(phase: Literal["loading", "rollout", "scoring", "update", "optimiser step"]) -> Iterator[None]:
    """Inside, memory that runs out is told in one line: the phase, what was asked for, what to make smaller.

    Raises:
        OutOfMemory: instead of torch's and Python's own exceptions.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, OutOfMemory) or not is_out_of_memory(error):
            raise  # a phase within this one knows better
        asked = str(error).strip().replace("\n", " ")[:240] or type(error).__name__
        raise OutOfMemory(
            f"out of memory in phase '{phase}' ({asked}); {_SMALLER[phase]}, then go on with --resume; dllm-rl "
            f"plan CONFIG says what takes how much"
        ) from error


def first_line(error: BaseException) -> str:
    """What another library says, in one line of at most 160 characters."""
    return str(error).strip().split("\n")[0][:160]


def require_package(package: str, extra: str, what: str) -> None:
    """Refuse what cannot run without a package that is not installed.

    Args:
        package: what is imported.
        extra: of ours, that installs it.
        what: the setting or command that needs it.
    Raises:
        UserError: it is not installed.
    """
    if importlib.util.find_spec(package) is None:
        raise UserError(f"{what} needs {package}, which is not installed; pip install 'dllm-rl[{extra}]'")
