"""dllm-rl: reinforcement learning and post-training for diffusion language models.

From Python: ``dllm_rl.train``, ``evaluate``, ``generate``, ``load`` and ``export``; see docs/python.md. They are
imported when they are first used, so that ``import dllm_rl`` costs nothing.
"""

import importlib
import logging
import sys
from types import ModuleType
from typing import Any

__version__ = "0.1.0"

# peft imports it wherever it is installed, and on a CPU it warns of a kernel that nothing here uses.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

_API = ("evaluate", "export", "generate", "load")


class _Callable(ModuleType):
    """The module dllm_rl.train: calling it is dllm_rl.api.train."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return importlib.import_module("dllm_rl.api").train(*arguments, **options)


class _Package(ModuleType):
    """This package. Python sets the attribute "train" to the module of that name, whoever imports it first."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "train" and type(value) is ModuleType:
            value.__class__ = _Callable
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name == "train":
        return importlib.import_module("dllm_rl.train")
    if name in _API:
        return getattr(importlib.import_module("dllm_rl.api"), name)
    raise AttributeError(f"module 'dllm_rl' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), "train", *_API})
