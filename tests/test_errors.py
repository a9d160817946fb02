"""Errors carry one code, one status and one word on whether trying again can help; every code is explained."""

from __future__ import annotations

import ast
import re

import pytest

from pool_managerd import EngineError, NodeError, PoolError, RequestError, SpecError
from pool_managerd.errors import CODES
from tests.conftest import REPOSITORY

_CODE = re.compile(r"[A-Z]+(_[A-Z]+)+")
_CALLS = {"refuse": 1, "refusing_request": 0, "error": 1}


SOURCES = {path: path.read_text("utf-8") for path in (REPOSITORY / "src/pool_managerd").rglob("*.py")}


def used() -> set[str]:
    """Codes that the source gives to errors: by keyword, as a class's default, in the lifecycle's refusals."""
    found: set[object] = set()
    for path, text in SOURCES.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.keyword) and node.arg == "code":
                found |= {n.value for n in ast.walk(node.value) if isinstance(n, ast.Constant)}
            elif isinstance(node, ast.Call):
                name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                found |= {a.value for a in node.args[_CALLS.get(name, 99) :][:1] if isinstance(a, ast.Constant)}
            elif (
                path.name == "errors.py" and isinstance(node, ast.AnnAssign | ast.Assign) and isinstance(node.value, ast.Constant)
            ):
                found.add(node.value.value)
    return {code for code in found if isinstance(code, str) and _CODE.fullmatch(code)}


def test_every_code_is_explained() -> None:
    assert used() - CODES.keys() == set()


@pytest.mark.parametrize("code", sorted(CODES))
def test_every_explained_code_is_given_somewhere(code: str) -> None:
    places = [path for path, text in SOURCES.items() if path.name != "errors.py" and f'"{code}"' in text]
    assert places or code in {kind.code for kind in (PoolError, SpecError, NodeError, EngineError, RequestError)}


def test_an_error_says_one_truth() -> None:
    not_found = RequestError("x", code="POOL_NOT_FOUND", status=404)
    assert (not_found.code, not_found.status, not_found.retriable) == ("POOL_NOT_FOUND", 404, False)
    assert (RequestError.code, RequestError("y").status) == ("INVALID_PARAMS", 400), "the class keeps its own"
    assert EngineError("x", retriable=True).retriable and NodeError("x").retriable and not SpecError("x").retriable
