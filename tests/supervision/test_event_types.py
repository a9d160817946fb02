"""Every type of event is explained, and every explained one can happen."""

from __future__ import annotations

import ast

from pool_managerd.core.event import EVENT_TYPES
from tests.conftest import REPOSITORY

QUIET = {"apply", "probe"}
"""For metrics alone: nobody subscribes to them."""
TO_ONE_READER = {"gap"}
"""Never happens; a subscription begins with it."""


def test_every_type_of_event_is_explained() -> None:
    told = set()
    for path in (REPOSITORY / "src/pool_managerd").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and node.args:
                name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                if name in {"emit", "_emit", "Say"}:
                    told |= {n.value for n in ast.walk(node.args[0]) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    assert told - QUIET == EVENT_TYPES.keys() - TO_ONE_READER
