"""Every fault that the project claims to survive, tried for real; makes the tables of docs/reliability.md.

    python scripts/faults.py                  # everything
    python scripts/faults.py disk rewards     # these files of scripts/faults/
    python scripts/faults.py disk --write     # and put their tables into docs/reliability.md

A file of scripts/faults/ has a TITLE and a function faults(output) that tries its faults in the folder and yields a
Row for each. Exit code 1 if one was not survived. Only processes that the script has started are ended.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from fault_row import Row

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent / "docs" / "reliability.md"
KINDS = sorted(file.stem for file in (HERE / "faults").glob("*.py"))


def load(kind: str) -> ModuleType:
    """A file of scripts/faults/, whatever its name means elsewhere."""
    spec = importlib.util.spec_from_file_location(f"fault_{kind}", HERE / "faults" / f"{kind}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def table(title: str, rows: Sequence[Row]) -> str:
    """One kind's faults in Markdown."""
    lines = [f"### {title}", "", "| fault | tried | survived | what a user sees |", "|---|---|---|---|"]
    return "\n".join([*lines, *(f"| {r.fault} | {r.tried} | {r.survived} | {r.seen} |" for r in rows), ""])


def write(kind: str, text: str) -> None:
    """Replace the table of a kind in the page."""
    page, begin, end = PAGE.read_text(encoding="utf-8"), f"<!-- {kind} -->\n", f"<!-- end of {kind} -->\n"
    if begin not in page:
        page = f"{page.rstrip()}\n\n{begin}{end}"
    head, _, rest = page.partition(begin)
    _, _, tail = rest.partition(end)
    PAGE.write_text(f"{head}{begin}{text}\n{end}{tail}", encoding="utf-8")


def main() -> int:
    """Try the faults; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=", ".join(KINDS))
    parser.add_argument("--write", action="store_true", help=f"put the tables into {PAGE.name}")
    arguments = parser.parse_args()
    for kind in arguments.kinds:
        if kind not in KINDS:
            parser.error(f"unknown kind '{kind}'; there are: {', '.join(KINDS)}")
    lost = 0
    for kind in arguments.kinds or KINDS:
        module, rows = load(kind), []
        with tempfile.TemporaryDirectory(prefix=f"faults-{kind}-") as folder:
            for row in module.faults(Path(folder)):
                print(f"{kind}: {row.fault}: {row.survived} of {row.tried} ({row.seen})", flush=True)
                rows.append(row)
        lost += sum(row.tried - row.survived for row in rows)
        if arguments.write:
            write(kind, table(module.TITLE, rows))
    print("every fault was survived" if not lost else f"{lost} faults were not survived")
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
