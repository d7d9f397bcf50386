"""The shape of the code base: imports point down, files stay small, names and entry points hold."""

from __future__ import annotations

import ast
import graphlib
import inspect
import io
import re
import subprocess
import sys
import tokenize
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from dllm_rl import registry
from dllm_rl.config.load import load_config
from dllm_rl.models.family import Family
from dllm_rl.protocols.algorithm import Algorithm
from dllm_rl.protocols.engine import RolloutEngine
from dllm_rl.protocols.rollouter import Rollouter
from dllm_rl.protocols.strategy import UnmaskingStrategy
from dllm_rl.protocols.task import Task
from dllm_rl.protocols.transport import Transport

ROOT = Path(__file__).resolve().parents[1]
PLUGINS = ("algorithms", "rollouts", "rewards")
PROJECT = ("dllm_rl", *PLUGINS)

# A module may import what stands in a line above its own, and its own package. The longest matching name decides.
LAYERS: list[list[str]] = [
    ["dllm_rl", "dllm_rl.errors", "dllm_rl.literals", "dllm_rl.seeding"],
    ["dllm_rl.types", "dllm_rl.registry"],
    ["dllm_rl.protocols"],
    ["dllm_rl.config", "dllm_rl.diffusion", "dllm_rl.storage"],
    ["dllm_rl.models", "dllm_rl.data", "dllm_rl.tasks"],
    ["dllm_rl.cluster", "dllm_rl.learner", "dllm_rl.reports", "dllm_rl.reward_pool", "dllm_rl.weight_transfer"],
    ["dllm_rl.evaluation", "dllm_rl.workers"],
    ["dllm_rl.driver"],
    ["dllm_rl.train", "dllm_rl.conformance", "dllm_rl.planning"],
    ["dllm_rl.api"],
    ["dllm_rl.cli"],
    ["dllm_rl.__main__"],
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
FOR_PLUGINS = {
    "types",
    "plans",
    "protocols",
    "strategy",
    "diffusion",
    "models",
    "config",
    "seeding",
    "registry",
    "errors",
}


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path: Path) -> Iterator[str]:
    """Every module that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            # "from dllm_rl import seeding" imports a module, "from dllm_rl.types import Loss" a name of one.
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def layer(name: str) -> str:
    parts = name.split(".")
    return next(known for end in range(len(parts), 0, -1) if (known := ".".join(parts[:end])) in RANK)


def violations(path: Path) -> list[str]:
    me = module_name(path)
    found = []
    for name in imported(path):
        root = name.split(".")[0]
        if root not in PROJECT:
            continue
        if me.split(".")[0] in PLUGINS:
            own = root == me.split(".")[0]
            sibling = own and me.startswith("algorithms.") and name.startswith("algorithms.")
            if sibling or not (own or (root == "dllm_rl" and name.split(".")[1] in FOR_PLUGINS)):
                found.append(f"{me} imports {name}")
        elif root in PLUGINS or (layer(name) != layer(me) and RANK[layer(name)] >= RANK[layer(me)]):
            found.append(f"{me} imports {name}")
    return found


@pytest.mark.parametrize("path", sources(*PROJECT), ids=module_name)
def test_imports_point_down(path):
    assert violations(path) == []


def test_no_import_goes_in_a_circle():
    """Within a package too; what is imported under TYPE_CHECKING or inside functions counts."""
    known = {module_name(path) for path in sources(*PROJECT)}

    def module_of(name: str) -> str | None:
        return next((n for n in (name, name.rpartition(".")[0]) if n in known), None)

    graph = {module_name(p): {m for n in imported(p) if (m := module_of(n)) is not None} for p in sources(*PROJECT)}
    with pytest.raises(graphlib.CycleError):
        graphlib.TopologicalSorter(graph | {"dllm_rl.types": {"dllm_rl.train"}}).prepare()
    graphlib.TopologicalSorter(graph).prepare()


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("dllm_rl/types.py", "import dllm_rl.protocols.task"),
        ("dllm_rl/diffusion/x.py", "from dllm_rl.models.lora import add_lora"),
        ("dllm_rl/learner/x.py", "def f():\n    import dllm_rl.train"),
        ("dllm_rl/driver/build.py", "import algorithms.trace_rl"),
        ("dllm_rl/evaluation/evaluate.py", "from dllm_rl.driver.build import Parts"),
        ("algorithms/x.py", "from algorithms.trace_rl import TraceRL"),
        ("algorithms/x.py", "from dllm_rl.learner import checkpoint"),
        ("rollouts/x.py", "import algorithms"),
        ("rewards/x.py", "from dllm_rl.reward_pool.score import score_completions"),
    ],
)
def test_a_wrong_import_is_seen(tmp_path, monkeypatch, name, line):
    path = tmp_path / name
    path.parent.mkdir(parents=True)
    path.write_text(line)
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    assert len(violations(path)) == 1


def code_lines(text: str) -> int:
    """Lines that hold code: comments, docstrings and blank lines are free."""
    documented: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        for child in getattr(node, "body", []) if not isinstance(node, ast.Lambda | ast.IfExp) else []:
            if (
                isinstance(child, ast.Expr)
                and isinstance(child.value, ast.Constant)
                and isinstance(child.value.value, str)
            ):
                documented |= set(range(child.lineno, (child.end_lineno or child.lineno) + 1))
    free = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in free:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return len(lines - documented)


def test_files_stay_small():
    for path in [*sources(*PROJECT), *sources("tests", "scripts")]:
        limit = 140 if path == ROOT / "dllm_rl" / "train.py" else 300
        count = code_lines(path.read_text(encoding="utf-8"))
        assert count <= limit, f"{path} has {count} code lines; split it by concept into a folder"


def test_code_lines_are_counted_without_prose():
    text = '''"""Docstring
of two lines."""

x = """text
that counts"""  # a comment
# free
class A:
    """Free."""
    y: int = 0
    """Help."""
'''
    assert code_lines(text) == 4


def test_the_package_stays_small():
    """A growth that is worth it raises the number in the same commit, which says what was taken out to pay for it."""
    assert sum(code_lines(path.read_text(encoding="utf-8")) for path in sources("dllm_rl")) <= 20500


@pytest.mark.parametrize("module", ["dllm_rl.types", "dllm_rl.protocols", "dllm_rl.diffusion"])
def test_the_core_needs_torch_alone(module):
    names = [f"{module}.{p.stem}" for p in (ROOT / module.replace(".", "/")).glob("[a-z]*.py")] or [module]
    code = (
        f"import sys, {', '.join(names)}\n"
        "heavy = {'ray', 'deepspeed', 'transformers', 'peft', 'vllm', 'wandb', 'datasets', 'pydantic', 'trl'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda p: p.name)
def test_every_configuration_loads(path):
    assert load_config(path).run.steps >= 1


def random_uses(path: Path) -> set[str]:
    """Global generators, and generators that are made outside seeding.py; the type random.Random may be named."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    called = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    forbidden = ("torch.manual_seed", "torch.random.manual_seed", "torch.seed", "random.", "np.random", "numpy.random")
    return {n for n in names if n.startswith(forbidden) and n != "random.Random"} | (called & {"random.Random"})


def test_randomness_comes_from_one_module():
    for path in sources(*PROJECT):
        if path != ROOT / "dllm_rl" / "seeding.py":
            assert not random_uses(path), f"{path} uses {random_uses(path)}; draw from dllm_rl.seeding"
    assert random_uses(ROOT / "dllm_rl" / "seeding.py"), "the walk sees nothing"


BASES = {
    "algorithms": Algorithm,
    "engines": RolloutEngine,
    "rollouters": Rollouter,
    "strategies": UnmaskingStrategy,
    "tasks": Task,
    "transports": Transport,
}


def entry_points() -> list[tuple[str, str, str]]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = project["entry-points"].items()
    return [(group.removeprefix("dllm_rl."), name, value) for group, points in groups for name, value in points.items()]


@pytest.mark.parametrize(("kind", "name", "value"), entry_points())
def test_entry_points_resolve_to_their_kind(kind, name, value):
    plugin = registry.load(kind, name)
    if kind == "families":  # an instance, which does not know where it is
        assert isinstance(plugin, Family) and plugin.name == name
        return
    assert f"{plugin.__module__}:{plugin.__qualname__}" == value
    assert issubclass(plugin, BASES[kind]) if kind in BASES else callable(plugin.__call__)


def family_branches(text: str) -> list[str]:
    """Comparisons with the name of a registered family."""
    families = set(registry.names("families"))
    nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Compare | ast.MatchValue)]
    constants = [(n, c) for n in nodes for c in ast.walk(n) if isinstance(c, ast.Constant) and isinstance(c.value, str)]
    return [ast.unparse(node) for node, constant in constants if constant.value in families]


def test_only_models_know_families_by_name():
    for path in sources(*PROJECT):
        if not path.is_relative_to(ROOT / "dllm_rl" / "models"):
            found = family_branches(path.read_text())
            assert not found, f"{path}: '{found[0]}'; let the Family declare what differs"
    assert family_branches("size = 4 if family == 'sdar' else None") == ["family == 'sdar'"]


def test_every_plugin_file_is_registered():
    registered = {value.split(":")[0] for _, _, value in entry_points()}
    declared = re.compile(r"^[A-Z]+ = Family[(]", re.M)
    for path in (ROOT / "dllm_rl" / "models").glob("*.py"):
        assert not declared.search(path.read_text()) or module_name(path) in registered, f"{path} has no entry point"
    files = [*sources("algorithms"), *(ROOT / "rollouts" / "strategies").glob("*.py"), *sources("rewards")]
    for path in files:
        assert path.name == "__init__.py" or module_name(path) in registered, f"{path} has no entry point"


def test_public_things_have_docstrings():
    """Ruff's D rules skip overridden methods' kin and nested names; this walks what help() shows."""
    for path in sources(*PROJECT):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{path}: {node.name} has no docstring"


def test_names_in_configurations_are_registered():
    for path in sorted((ROOT / "configs").rglob("*.yaml")):
        config = load_config(path)
        assert config.algorithm.name in registry.names("algorithms")
        assert config.data.task.name in registry.names("tasks")
        assert config.sampling.strategy.name in registry.names("strategies")
        assert {r.name for r in config.rewards or []} <= set(registry.names("rewards"))


def test_every_algorithm_has_a_tiny_and_a_full_scale_configuration():
    for size in ("tiny", "paper"):
        found = {load_config(p).algorithm.name for p in (ROOT / "configs" / "methods").glob(f"*_{size}.yaml")}
        assert found == set(registry.names("algorithms")), size


def test_algorithms_cite_their_source():
    for path in sources("algorithms"):
        if path.name != "__init__.py":
            text = inspect.cleandoc(ast.get_docstring(ast.parse(path.read_text())) or "")
            assert "arXiv:" in text, f"{path}: the header names no source"
