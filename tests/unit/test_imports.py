"""Imports point downward only, and bookkeeping imports no array library."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import tael

ROOT = Path(tael.__file__).parent
LAYERS = [
    ("cli",),
    ("server",),
    ("llm", "async_llm", "evals"),
    ("engine",),
    ("speculative", "cache", "memory", "economics"),
    ("backends", "models", "quant", "loader"),
    ("config", "request"),
    ("errors", "_native"),
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
MODULES = sorted(p for p in ROOT.rglob("*.py") if p.parent != ROOT or p.stem != "__init__")


def imports(path: Path) -> Iterator[str]:
    """Dotted names that a module imports at run time, at its top or inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_downward(path: Path) -> None:
    own = path.relative_to(ROOT).with_suffix("").parts[0]
    for name in imports(path):
        if name.startswith("tael."):
            other = name.split(".")[1]
            assert other in LEVEL or other == "__version__" or other[0].isupper(), name
            assert LEVEL.get(other, LEVEL[own]) >= LEVEL[own], f"{own} imports {name}"


BOOKKEEPING = [*sorted((ROOT / "cache").glob("*.py")), ROOT / "engine" / "scheduler.py"]


@pytest.mark.parametrize("path", BOOKKEEPING, ids=lambda p: p.name)
def test_bookkeeping_needs_no_arrays(path: Path) -> None:
    assert not [n for n in imports(path) if n.split(".")[0] in ("numpy", "torch")]


CAN_RUN_WHAT_IT_READS = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
CAN_RUN_WHAT_IT_READS |= {"torch", "transformers", "yaml", "runpy", "code", "codeop"}


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_that_is_read_can_be_run(path: Path) -> None:
    names = {name.split(".")[0] for name in imports(path)}
    assert not names & CAN_RUN_WHAT_IT_READS
    assert "multiprocessing" not in names or "evals" in path.parts  # it sends pickles to a child
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    named = {node.func.id for node in calls if isinstance(node.func, ast.Name)}
    assert not named & {"eval", "exec", "compile", "__import__"}
    assert not any(keyword.arg == "allow_pickle" for node in calls for keyword in node.keywords)
