"""Hostile reward functions: those of tests/reward_pool/hostile.py, each between two ordinary rows."""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from fault_row import Row

from dllm_rl.config.schema import RewardPlugin
from dllm_rl.reward_pool.pool import RewardPool

TITLE = "Hostile reward functions"
TIMEOUT_S, MARGIN_S = 0.5, 1.0
SEEN = {
    "sends": ("forged, broken and giant replies", "failed rows: the verifier broke the protocol of replies"),
    "hangs": ("loops, C code, half replies, a stopped worker", "failed rows, timed out"),
    "returns": ("no finite float32, exceptions, too many values", "failed rows with what was returned"),
    "dies": ("exits, crashes, closed channels", "failed rows; the worker is replaced"),
    "leaves": ("forks, setsid, floods, patched modules, alarms", "a verdict or a failed row; nothing is left"),
}
ROOT = Path(__file__).resolve().parents[2]


def faults(output: Path) -> Iterator[Row]:
    """Try every case; survived: the rows beside it are scored, in time, and nothing ran in the driver."""
    spec = importlib.util.spec_from_file_location("hostile_cases", ROOT / "tests" / "reward_pool" / "hostile.py")
    assert spec is not None and spec.loader is not None
    cases = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(cases)
    owned = output / "owned"
    (output / "hostile_reward.py").write_text(cases.PRELUDE.replace("OWNED", str(owned)) + cases.REWARD)
    sys.path.insert(0, str(output))
    plugin = RewardPlugin(name="hostile_reward:Hostile", timeout_s=TIMEOUT_S)
    with RewardPool([plugin], num_workers=2) as pool:
        for kind, (fault, seen) in SEEN.items():
            codes = [case for name, case in cases.CASES.items() if name.startswith(f"{kind}: ")]
            yield Row(fault, len(codes), sum(survives(pool, *case) and not owned.exists() for case in codes), seen)
    sys.path.remove(str(output))


def survives(pool: RewardPool, code: str, statuses: tuple[str, ...]) -> bool:
    """Whether an attack costs its own row alone, and no more than its deadline (twice if it was tried again)."""
    pool.score(["p"] * 2, ["value = 1.0"] * 2, {})
    began = time.monotonic()
    rewards = pool.score(["p"] * 3, ["value = 1.0", code, "value = 2.0"], {})
    in_time = time.monotonic() - began < 2 * (TIMEOUT_S + MARGIN_S)
    survived = in_time and rewards.status[1] in statuses and rewards.total[[0, 2]].tolist() == [1.0, 2.0]
    if not survived:
        print(f"not survived: {code}: {rewards.status}, {rewards.reasons}", file=sys.stderr)
    return survived
