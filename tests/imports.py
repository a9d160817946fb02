"""Which package imports which, read from the source: imports inside functions and under TYPE_CHECKING count too."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path

SOURCE = Path(__file__).resolve().parent.parent / "src/pool_managerd"
Graph = Mapping[str, frozenset[str]]
EVERYWHERE = ("errors", "failpoints", "_version")
"""What anybody may import and what imports nothing of ours: no picture needs it."""


def _names(path: Path) -> Iterable[str]:
    """Every name of this package that the file imports, dotted, without the package's own."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _module(name: str) -> str | None:
    """The module that ``pool_managerd.a.b.name`` is, or is in; None for what is not ours."""
    parts = name.split(".")
    if parts[0] != "pool_managerd":
        return None
    while len(parts) > 1:
        path = SOURCE.joinpath(*parts[1:])
        if path.with_suffix(".py").exists() or path.is_dir():
            return ".".join(parts[1:])
        parts.pop()
    return ""


@cache
def modules() -> Graph:
    """Module → the modules that it imports. ``__init__`` files are their package."""
    found: dict[str, frozenset[str]] = {}
    for path in SOURCE.rglob("*.py"):
        name = ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix("__init__").removesuffix(".")
        targets = {module for imported in _names(path) if (module := _module(imported)) is not None}
        found[name] = frozenset(targets - {name})
    return found


def package(module: str) -> str:
    """The folder that a module is in; the module itself where it stands alone on top."""
    if SOURCE.joinpath(*module.split(".")).is_dir():
        return module
    return module.rpartition(".")[0] or module


@cache
def packages() -> Graph:
    """Package → the packages that it imports, without the library's front (``__init__``) and what everybody may import."""
    found: defaultdict[str, set[str]] = defaultdict(set)
    for module, targets in modules().items():
        if module and package(module) not in EVERYWHERE:
            found[package(module)] |= {package(target) for target in targets if target} - {package(module), *EVERYWHERE}
    return {name: frozenset(targets) for name, targets in found.items()}


def circle(graph: Graph) -> list[str]:
    """One way from a node back to itself; empty when there is none."""
    done: set[str] = set()

    def walk(node: str, way: list[str]) -> list[str]:
        if node in way:
            return [*way[way.index(node) :], node]
        if node not in done:
            for target in sorted(graph.get(node, ())):
                if found := walk(target, [*way, node]):
                    return found
            done.add(node)
        return []

    return next((found for node in sorted(graph) if (found := walk(node, []))), [])


def levels(graph: Graph) -> dict[str, int]:
    """How high each package stands: one above the highest that it imports. The graph must have no circle."""
    found: dict[str, int] = {}

    def height(node: str) -> int:
        if node not in found:
            found[node] = 1 + max((height(target) for target in graph.get(node, ())), default=-1)
        return found[node]

    for node in graph:
        height(node)
    return found


def direct(graph: Graph) -> set[tuple[str, str]]:
    """The imports that no longer way says already: what a picture shows."""

    def beyond(node: str) -> set[str]:
        return {far for target in graph.get(node, ()) for far in {target} | beyond(target)}

    return {(node, t) for node, targets in graph.items() for t in targets if not any(t in beyond(o) for o in targets - {t})}
