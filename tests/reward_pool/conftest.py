"""Verifiers that misbehave, importable by reward workers as ``naughty:<name>``."""

import pytest

NAUGHTY = '''
import ctypes, json, os, signal, subprocess, sys, time
from rewards import Verdict

def good(prompts, completions, **columns):
    return [float(len(text)) for text in completions]

def columns_seen(prompts, completions, **columns):
    seen = (prompts, completions, columns["answer"], columns["level"])
    return [float(seen == (["p"], ["x"], ["a"], [3]))]

def as_told(prompts, completions, **columns):
    """Does what the completion says."""
    (text,) = completions
    word, _, rest = text.partition(" ")
    if word == "raise":
        raise RuntimeError(rest or "no")
    if word == "spin":
        while True:
            pass
    if word == "grind":
        return [float(7 ** (10 ** 9) % 3)]  # one C call of minutes that holds the interpreter lock
    if word == "sleep":
        time.sleep(float(rest))
    if word == "exit":
        os._exit(int(rest))
    if word == "systemexit":
        sys.exit(0)
    if word == "interrupt":
        raise KeyboardInterrupt
    if word == "signal":
        os.kill(os.getpid(), getattr(signal, rest))
    if word == "segfault":
        ctypes.string_at(0)
    if word == "hang_up":
        os.closerange(3, 100)
        time.sleep(60)
    if word == "print":
        for stream in (sys.stdout, sys.stderr):
            stream.write("noise " * 100_000)
            stream.flush()
        os.write(1, b"noise" * 100_000)
    if word == "fork":
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        open(rest, "w").write(str(child.pid))
        time.sleep(60)
    if word == "pid":
        open(rest, "w").write(str(os.getpid()))
    if word == "return":
        return eval(rest)
    return [1.0]

def modules(prompts, completions, **columns):
    return [float(name in sys.modules) for name in completions]

def always_one(prompts, completions, **columns):
    return [1.0] * len(completions)

def always_zero(prompts, completions, **columns):
    return [0.0] * len(completions)

class Picky:
    from dataclasses import dataclass

    @dataclass(frozen=True)
    class Config:
        scale: float = 1.0

    def __init__(self, config):
        self.config = config

    def __call__(self, prompts, completions, **columns):
        return [self.config.scale] * len(completions)

class Refusing(Picky):
    def __init__(self, config):
        raise ValueError("no judge model at 'x'")

class Unstartable(Picky):
    def __init__(self, config):
        os._exit(3)
'''


@pytest.fixture
def naughty(tmp_path, monkeypatch):
    """Puts the module on the path; workers inherit it."""
    (tmp_path / "naughty.py").write_text(NAUGHTY)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "naughty", raising=False)
    return tmp_path
