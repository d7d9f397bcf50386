"""Holds plugins of other people to their contracts, see dllm_rl/protocols, at every call.

What a method raises, or returns against its contract, becomes one line that names the plugin and the method. The
driver, learners and engines call all plugins alike: the guard is a subclass that is made when a plugin is built.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dllm_rl import registry
from dllm_rl.errors import UserError
from dllm_rl.protocols.algorithm import Algorithm
from dllm_rl.protocols.denoiser import Cache
from dllm_rl.protocols.engine import RolloutEngine
from dllm_rl.protocols.rollouter import Rollouter, Turn
from dllm_rl.protocols.strategy import Candidates, UnmaskingStrategy
from dllm_rl.protocols.task import Task
from dllm_rl.protocols.transport import Transport
from dllm_rl.registry import Kind
from dllm_rl.types import Example, Loss, MaskSample, RolloutBatch, Trajectory

_BASES: Mapping[Kind, type] = {
    "algorithms": Algorithm,
    "strategies": UnmaskingStrategy,
    "tasks": Task,
    "engines": RolloutEngine,
    "rollouters": Rollouter,
    "transports": Transport,
    "caches": Cache,
}
_FLOAT, _BOOL = (torch.float32, torch.float64, torch.bfloat16, torch.float16), (torch.bool,)


@functools.cache
def guard(kind: Kind, name: str, plugin: Any) -> Any:
    """A subclass of a plugin class that is held to the contract of the kind.

    Args:
        kind: what it is; not a reward, which the pool holds to its contract.
        name: as the user wrote it, for messages.
        plugin: the class.
    Raises:
        UserError: it is not a subclass of the contract's base class, or lacks methods of a protocol.
    """
    who, base = registry.label(kind, name), _BASES[kind]
    protocol = getattr(base, "_is_protocol", False)
    wanted = [clause for clause in vars(base) if protocol and inspect.isfunction(vars(base)[clause])]
    fits = isinstance(plugin, type) and (protocol or issubclass(plugin, base))
    if not fits or not all(hasattr(plugin, clause) for clause in wanted if clause[0] != "_"):
        must = "a class with the methods of" if protocol else "a subclass of"
        raise UserError(f"{who} must be {must} {base.__module__}.{base.__name__}")
    where = plugin.__module__
    # What the class lacks stays an AttributeError: isinstance() asks for the members of optional protocols.
    clauses = frozenset(clause for clause in _clauses(base) if hasattr(plugin, clause))

    def call(clause: str, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        wanted, holds = _RULES.get(clause, ("", lambda *_: True))
        with registry.plugin_boundary(kind, name, f"{clause}()", where):
            value = method(*args, **kwargs)
            n, width = _sizes(clause, method, args, kwargs)
            fits = holds(value, n, width)
        if not fits:
            here = f" (here {n} x {width})" if width else ""
            raise UserError(f"{who}: {clause}() must return {wanted}{here}, returned {_shown(value)}")
        return value

    class Guarded(plugin):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            with registry.plugin_boundary(kind, name, "__init__()", where):
                super().__init__(*args, **kwargs)

        def __getattribute__(self, clause: str) -> Any:
            if clause not in clauses:
                return super().__getattribute__(clause)
            with registry.plugin_boundary(kind, name, clause, where):  # it may be a property
                value = super().__getattribute__(clause)
            if not callable(value):
                return value
            return functools.update_wrapper(functools.partial(call, clause, value), value)

        def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
            """By way of the plugin, because pickle would not find this class under its name."""
            return _unpickled, (kind, name, plugin), self.__getstate__()

    Guarded.__name__, Guarded.__qualname__, Guarded.__module__ = plugin.__name__, plugin.__qualname__, where
    return Guarded


def _unpickled(kind: Kind, name: str, plugin: Any) -> Any:
    kept = guard(kind, name, plugin)
    return kept.__new__(kept)


def _clauses(base: type) -> Sequence[str]:
    """Public methods and properties of a contract: of its base class, and of optional protocols beside it."""
    module = sys.modules[base.__module__]
    classes = [kind for kind in vars(module).values() if getattr(kind, "__module__", None) == module.__name__]
    members = [item for kind in classes for item in vars(kind).items()]
    return [n for n, m in members if n[0] != "_" and (inspect.isfunction(m) or isinstance(m, property))]


def _sizes(clause: str, method: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[int, int]:
    """(N, L) of the batch or (N, W) of the candidates that a method is given; (rows, 0) of an engine; (bytes, 0) of a
    transport's buffer; (N, S + W) of a cache's entries and a window's.
    """
    if clause == "receive":
        return args[1], 0
    if clause == "update":
        return len(args[0]), method.__self__.valid.shape[1] + args[0].shape[2]
    for value in (*args, *kwargs.values()):
        if isinstance(value, RolloutBatch | Candidates):
            n, width = (value.tokens if isinstance(value, RolloutBatch) else value.eligible).shape
            return n, width
    prompts = kwargs.get("prompts", args[0] if args else ())
    return len(prompts) * kwargs.get("samples_per_prompt", 1) if isinstance(prompts, Sequence) else 0, 0


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} tensor {tuple(value.shape)}"
    if isinstance(value, Loss):
        return f"Loss of {_shown(value.value)} and {', '.join(map(_shown, value.metrics.values())) or 'no metrics'}"
    if isinstance(value, MaskSample):
        return f"MaskSample of {_shown(value.mask)} and {_shown(value.weight)}"
    return f"{type(value).__name__} of {len(value)}" if isinstance(value, list | tuple) else type(value).__name__


def _tensor(value: Any, dtypes: Sequence[torch.dtype], *shapes: tuple[int, ...]) -> bool:
    """Whether it is a tensor of one of the shapes; 0 in front stands for any number of draws."""
    if not isinstance(value, Tensor) or value.dtype not in dtypes:
        return False
    return any(tuple(value.shape) == (s if s[:1] != (0,) else (*value.shape[:1], *s[1:])) for s in shapes)


def _masks(value: Any, n: int, length: int) -> bool:
    fits = isinstance(value, MaskSample) and _tensor(value.mask, _BOOL, (0, n, length))
    return fits and _tensor(value.weight, _FLOAT, tuple(value.mask.shape))


def _loss(value: Any, n: int, length: int) -> bool:
    fits = isinstance(value, Loss) and all(_tensor(one, _FLOAT, ()) for one in (value.value, *value.metrics.values()))
    return fits and (value.value.requires_grad or not torch.is_grad_enabled())


def _entries(value: Any, n: int, length: int) -> bool:
    pair = isinstance(value, tuple) and len(value) == 2
    return pair and all(isinstance(v, Tensor) and v.dim() == 4 and v.shape[::2] == (n, length) for v in value)


def _all(value: Any, kind: type, container: Any = Sequence) -> bool:
    return isinstance(value, container) and all(isinstance(item, kind) for item in value)


# What a method must return, and whether a value is that, given the sizes of its input: N rows, and L or W.
_RULES: Mapping[str, tuple[str, Callable[[Any, int, int], bool]]] = {
    "advantages": (
        "a float tensor (N,), (N, L) or (K, N, L)",
        lambda v, n, w: _tensor(v, _FLOAT, (n,), (n, w), (0, n, w)),
    ),
    "masks": ("MaskSample of a bool mask and a float weight, both (K, N, L)", _masks),
    "reference_masks": ("MaskSample of a bool mask and a float weight, both (K, N, L)", _masks),
    "joint_masks": (
        "a sequence of such MaskSamples as masks() gives",
        lambda v, n, w: isinstance(v, Sequence) and all(_masks(one, n, w) for one in v),
    ),
    "loss": ("Loss of scalar float tensors, its value differentiable in new.token_logp", _loss),
    "keep": ("a bool tensor (N,)", lambda v, n, _: _tensor(v, _BOOL, (n,))),
    "select": ("a bool or int64 tensor (N, W)", lambda v, n, w: _tensor(v, (*_BOOL, torch.int64), (n, w))),
    "examples": ("a sequence of Example", lambda v, *_: _all(v, Example)),
    "self_test": ("two texts, (gold, wrong)", lambda v, *_: v is None or (_all(v, str, tuple) and len(v) == 2)),
    "roll_out": ("a list of Turn", lambda v, *_: _all(v, Turn, list)),
    "receive": ("a uint8 tensor of the buffer's bytes", lambda v, n, _: _tensor(v, (torch.uint8,), (n,))),
    "update": ("two tensors (N, H, S + W, head width)", _entries),
    "generate": ("a list of Trajectory, N in all", lambda v, n, _: _all(v, Trajectory, list) and len(v) == n),
}
