"""The disk fails at every single operation of a run; files are damaged; two processes want one run folder."""

from __future__ import annotations

import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from fault_row import Row

from dllm_rl.config.load import validate
from dllm_rl.errors import UserError
from dllm_rl.reports.progress import Quiet
from dllm_rl.storage.lock import held
from tests.faulty_disk import KINDS
from tests.one_run import configuration, operations, outcome, run, survived

TITLE = "The disk, and what lies on it"


def _add(name: str, data: bytes) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes() + data)


def _keep(pattern: str, share: float) -> Callable[[Path], Any]:
    def damage(folder: Path) -> None:
        path = next(folder.glob(pattern))
        data = path.read_bytes()
        path.write_bytes(data[: int(len(data) * share)])

    return damage


LAST = "checkpoints/step-000002"
DAMAGE: dict[str, Callable[[Path], Any]] = {
    "half a line at the end of a record": _add("metrics.jsonl", b'{"step": 9, "lo'),
    "zeros at the end of a record": _add("metrics.jsonl", b"\0" * 40),
    "a cut UTF-8 character at the end of a record": _add("samples.jsonl", '{"text": "é'.encode()[:-1]),
    "rows lost from a record": _keep("ledger.jsonl", 0.0),
    "a record that is gone": lambda folder: (folder / "ledger.jsonl").unlink(),
    "an empty config.yaml": _keep("config.yaml", 0.0),
    "config.yaml gone": lambda folder: (folder / "config.yaml").unlink(),
    "a weight file cut short": _keep(f"{LAST}/model/*.safetensors", 0.9),
    "an optimiser file cut short": _keep(f"{LAST}/optimizer.pt", 0.9),
    "a checkpoint without its manifest": lambda folder: (folder / LAST / "manifest.json").unlink(),
    "a checkpoint without its model": lambda folder: shutil.rmtree(folder / LAST / "model"),
    "half a checkpoint that was being written": lambda folder: (folder / "checkpoints/.writing-step-000003").mkdir(),
    "half a checkpoint that was being removed": lambda folder: (folder / "checkpoints/.removing-step-000001").mkdir(),
    "a checkpoint whose successor never came": lambda folder: (folder / LAST).rename(
        folder / "checkpoints/.stale-step-000002"
    ),
}


def faults(output: Path) -> Iterator[Row]:
    """See scripts/faults.py."""
    disk = operations(output / "whole")
    expected = outcome(output / "whole" / "run")
    for kind in KINDS:
        ends: Counter[str] = Counter()
        for fail_at in range(1, disk.count + 1):
            try:
                ends[survived(output / "runs", fail_at, kind, expected).split(":")[0]] += 1
            except KeyboardInterrupt:
                raise
            except BaseException as error:  # whatever it is, it is not survived
                print(f"{disk.names[fail_at - 1]}, {kind}: {error!r:.300}", file=sys.stderr)
        what = "a kill" if kind == "kill" else kind
        seen = ", ".join(f"{name}: {count}" for name, count in ends.items())
        yield Row(f"{what} at each of a run's {disk.count} operations on the disk", disk.count, ends.total(), seen)
    for name, damage in DAMAGE.items():
        yield Row(name, 1, *_damaged(output / "damaged", damage, expected))
    yield _two(output / "two")


def _damaged(output: Path, damage: Callable[[Path], Any], expected: tuple[Any, ...]) -> tuple[int, str]:
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir()
    asked = iter([False, False, True])  # before the first step, and after each one
    run(output, stop=lambda: next(asked, True))
    damage(output / "run")
    try:
        run(output, resume=True)
    except UserError as error:
        return 1, f"refused: {' '.join(str(error).replace(str(output), 'runs').split())}"
    same = outcome(output / "run")[:2] == expected[:2]
    return int(same), "repaired, the same bits" if same else "OTHER BITS"


def _two(output: Path) -> Row:
    output.mkdir()
    config = validate(configuration(output))
    with held(Path(config.run.output) / config.run.name, Quiet().log):
        child = os.fork()
        if child == 0:
            try:
                run(output)
            except UserError:
                os._exit(2)
            os._exit(0)
        _, status = os.waitpid(child, 0)
    return Row(
        "two processes in one run folder", 1, int(os.waitstatus_to_exitcode(status) == 2), "the second is refused"
    )
