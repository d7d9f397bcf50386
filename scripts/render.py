"""Fill a template of scripts/slurm or scripts/k8s: ${name} becomes a value, ${name:-default} has one already.

    python scripts/render.py scripts/slurm/train.sbatch nodes=2 gpus=8 config=configs/my_run.yaml > job.sbatch
    python scripts/render.py scripts/k8s/rayjob.yaml image=registry/dllm-rl:0.1 workers=2 > job.yaml
    python scripts/render.py scripts/k8s/rayjob.yaml --list

Shell variables of a template are written $$name and come out as $name.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path

_HOLE = re.compile(r"\$\$|\$\{(?P<name>[a-z_]+)(?::-(?P<default>[^}]*))?\}")


def holes(template: str) -> dict[str, str | None]:
    """Name -> default, None where a value must be given."""
    return {match["name"]: match["default"] for match in _HOLE.finditer(template) if match["name"]}


def render(template: str, values: Mapping[str, str]) -> str:
    """The filled template.

    Raises:
        ValueError: a value that is missing, or one that the template has no place for.
    """
    known = holes(template)
    foreign = sorted(values.keys() - known.keys())
    if foreign:
        raise ValueError(f"no place for {', '.join(foreign)}; the template takes {', '.join(known)}")
    missing = [name for name, default in known.items() if default is None and name not in values]
    if missing:
        raise ValueError(f"give a value for {', '.join(f'{name}=...' for name in missing)}")

    def fill(match: re.Match[str]) -> str:
        return "$" if match["name"] is None else values.get(match["name"], match["default"] or "")

    return _HOLE.sub(fill, template)


def main() -> int:
    """Print the rendered template."""
    if len(sys.argv) < 2 or not Path(sys.argv[1]).is_file():
        print(__doc__, file=sys.stderr)
        return 2
    template = Path(sys.argv[1]).read_text(encoding="utf-8")
    if sys.argv[2:] == ["--list"]:
        for name, default in holes(template).items():
            print(f"{name}={default}" if default is not None else f"{name} (needed)")
        return 0
    odd = [argument for argument in sys.argv[2:] if "=" not in argument]
    if odd:
        print(f"error: '{odd[0]}' is not name=value", file=sys.stderr)
        return 2
    try:
        values = dict(argument.split("=", 1) for argument in sys.argv[2:])
        print(render(template, values), end="")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
