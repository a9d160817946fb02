"""What people are told is in words of theirs: nothing of the code's own names, in the lifecycle and around it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[2] / "src/pool_managerd"
TELLING = {"Say", "refuse", "refusing_request", "emit", "PoolError", "SpecError", "NodeError", "EngineError", "RequestError",
           "CommandFailed"}  # fmt: skip
INTERNAL = re.compile(
    r"\b(epoch|staging|[Hh]elper ?[Dd]ied|inbox|effects?|phase|owed|sans-?io|[a-z]+_(breaker|preload|died|ok))\b"
)


def told(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Sentences: texts with a blank in them, in calls that tell somebody something."""
    for call in ast.walk(tree):
        if isinstance(call, ast.Call) and ast.unparse(call.func).rpartition(".")[2] in TELLING:
            for part in ast.walk(call):
                if isinstance(part, ast.Constant) and isinstance(part.value, str) and " " in part.value:
                    yield part.lineno, part.value


@pytest.mark.parametrize("folder", ["core", "supervision", "cli", "engines", "models", "runtime", "api"])
def test_no_internal_word_is_told_to_people(folder: str) -> None:
    found = [
        f"{path.relative_to(SOURCE)}:{line}: {text}"
        for path in sorted((SOURCE / folder).rglob("*.py"))
        for line, text in told(ast.parse(path.read_text("utf-8")))
        if INTERNAL.search(text)
    ]
    assert found == []
