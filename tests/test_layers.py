"""Who may import whom. Imports inside functions and under TYPE_CHECKING count too."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.imports import circle, modules, packages

SOURCE = Path(__file__).resolve().parent.parent / "src/pool_managerd"
CONFIG = {"config"}
ADAPTERS = ("host", "models", "engines", "runtime", "store")

ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "_version": set(),
    "failpoints": {"errors"},
    "core": {"core", "errors"},
    "config": {"config", "errors", "core"},
    **{name: {name, "core", "errors", "config"} for name in ADAPTERS},
    "supervision": {"supervision", "core", "errors", "config"},
    "telemetry": {"telemetry", "core", "errors", "config", "_version"},
    "node": {"supervision", "core", "errors", "config", "wiring", "_version"},
    "moving": {"moving", "core", "errors", "config"},
    "wiring": {"wiring", "moving", "supervision", "core", "errors", "config", "telemetry", *ADAPTERS},
    "httpd": {"httpd", "core", "errors", "config"},
    "api": {"api", "httpd", "node", "core", "errors", "config", "telemetry", "_version"},
    "gateway": {"gateway", "httpd", "node", "core", "errors", "config", "telemetry", "_version"},
    "cli": {
        "cli",
        "node",
        "core",
        "errors",
        "config",
        "telemetry",
        "api",
        "gateway",
        "httpd",
        "daemon",
        "moving",
        "wiring",
        "_version",
    },
    "testing": {"testing", "gateway", "node", "wiring", "store", "supervision", "core", "errors", "config"},
    "embedding": {"node", "core", "errors", "config"},
}
"""Part of the package → the parts it may import. ``daemon`` and the package itself wire everything."""

FORBIDDEN_TO_FAIL = {"core", "config", "errors", "cli", "moving"}
"""All others have places where a test may let them fail, and so import ``failpoints``, which knows nobody but ``errors``."""
COMPOSITION_ROOTS = {"daemon", "__init__", "__main__"}
CORE_STDLIB_FORBIDDEN = {
    "asyncio", "concurrent", "datetime", "fcntl", "http", "io", "logging", "multiprocessing", "os", "pathlib", "random",
    "secrets", "select", "selectors", "shutil", "socket", "ssl", "sqlite3", "subprocess", "tempfile", "threading", "time",
    "urllib", "uuid",
}  # fmt: skip
FORBIDDEN_NAMES = {"utils", "util", "helpers", "helper", "manager", "handler", "handlers", "base", "common"}
MAX_LINES = 350


def sources() -> list[Path]:
    return sorted(SOURCE.rglob("*.py"))


def part_of(path: Path) -> str:
    """``engines`` for engines/flags.py, ``config`` for config.py."""
    first = path.relative_to(SOURCE).parts[0]
    return first.removesuffix(".py")


def imported(tree: ast.AST) -> Iterator[tuple[str, int]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            yield module, node.lineno
            if module == "pool_managerd":
                yield from ((f"pool_managerd.{alias.name}", node.lineno) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from ((str(arg.value), node.lineno) for arg in node.args[:1] if isinstance(arg, ast.Constant))


def violations(path: Path, text: str) -> list[str]:
    """What ``text``, as the content of ``path``, imports against the rules."""
    part = part_of(path)
    found = []
    for module, line in imported(ast.parse(text)):
        top, _, rest = module.partition(".")
        place = f"{path.relative_to(SOURCE)}:{line}"
        if top == "pool_managerd":
            wanted = rest.partition(".")[0]
            if wanted == "failpoints" and part not in FORBIDDEN_TO_FAIL:
                continue
            if wanted and part not in COMPOSITION_ROOTS and wanted not in ALLOWED[part]:
                found.append(f"{place}: {part} may not import {wanted}")
        elif part == "core" and (top not in sys.stdlib_module_names or top in CORE_STDLIB_FORBIDDEN):
            found.append(f"{place}: core may not import {top}")
    return found


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(SOURCE)))
def test_a_module_imports_only_what_its_layer_may(path: Path) -> None:
    part = part_of(path)
    assert part in COMPOSITION_ROOTS or part in ALLOWED, f"{part} is new: say in ALLOWED what it may import"
    assert violations(path, path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("core/x.py", "import time"),
        ("core/x.py", "def f():\n    import asyncio"),
        ("core/x.py", "from pool_managerd.config import Config"),
        ("core/x.py", "import structlog"),
        ("engines/x.py", "def f():\n    from pool_managerd.models.refs import parse_ref"),
        ("models/x.py", "from pool_managerd import engines"),
        ("supervision/x.py", "import importlib\nimportlib.import_module('pool_managerd.runtime.launcher')"),
        ("api/x.py", "import pool_managerd.engines.submitted"),
        ("core/x.py", "from pool_managerd import failpoints"),
    ],
)
def test_the_rule_catches_a_forbidden_import(file: str, text: str) -> None:
    assert len(violations(SOURCE / file, text)) == 1


def test_no_circle_of_imports_neither_between_modules_nor_between_packages() -> None:
    assert circle(modules()) == []
    assert circle(packages()) == []


def test_a_circle_would_be_found() -> None:
    graph = {"a": frozenset({"b"}), "b": frozenset({"c"}), "c": frozenset({"b"})}
    assert circle(graph) == ["b", "c", "b"]


def test_only_its_actor_writes_to_the_record_of_a_pool() -> None:
    fields = {"definition", "state", "launch", "last_drain", "log_places"}
    written = {
        (path.stem, node.attr)
        for path in sources()
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store | ast.Del)
        if node.attr in fields and ast.unparse(node.value).split(".")[-1] == "pool"
    }
    assert written == {("actor", name) for name in fields - {"log_places"}}


def test_no_module_has_a_name_that_says_nothing() -> None:
    assert [path for path in sources() if path.stem in FORBIDDEN_NAMES] == []


def test_no_file_is_longer_than_a_person_reads() -> None:
    lengths = {str(path.relative_to(SOURCE)): len(path.read_text(encoding="utf-8").splitlines()) for path in sources()}
    assert {name: length for name, length in lengths.items() if length > MAX_LINES} == {}
