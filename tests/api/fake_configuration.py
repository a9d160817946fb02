"""A daemon's file that applies whatever it is told, and remembers what that was."""

from __future__ import annotations

from typing import Any

from pool_managerd.errors import PoolError
from tests.api.fake_node import FakeNode, FakeOperation

Json = dict[str, Any]


def row(pool_id: str, action: str, **more: Any) -> Json:
    """One pool of a plan."""
    return {
        "pool_id": pool_id, "action": action, "why": "because", "restarts": False, "changes": [], "strategy": None,
        "forecast_downtime_ms": None, "forecast_spread_ms": None, "forecast_duration_ms": None, "where": None, "problem": None,
        "ends_by": None, "drain_deadline_ms": None, "warnings": [],
        **more,
    }  # fmt: skip


class FakeConfiguration:
    """``planned`` is what it would do; ``fails`` is how the next apply ends, ``refuses`` why it is not accepted."""

    def __init__(self, node: FakeNode) -> None:
        self.node = node
        self.calls: list[tuple[str, Json]] = []
        self.planned: Json = {
            "file": "/etc/pm.yaml", "replaces_file": False, "edits": None, "by_hand": [], "without_effect": [],
            "digest": "d1", "would_change": True,
            "pools": [row("demo", "take_over", changes=[{"key": "restart", "old": None, "new": "never"}])], "at_once": [],
            "waiting": [], "untouched": 1, "forecast_duration_ms": 0,
        }  # fmt: skip
        self.outcome: Json = {"pools": {"demo": {"action": "take_over", "status": "succeeded"}}, "kept": []}
        self.fails: PoolError | None = None
        self.refuses: PoolError | None = None

    def history(self) -> list[Json]:
        shown = {"at_ms": 1_795_000_000_000, "pools": 2}
        return [
            {"number": 1, "origin": "start", "summary": "2 pools at the start", "kept": False, "result": None, **shown},
            {"number": 2, "origin": "apply", "summary": "reload demo", "kept": True, "result": "failed", "failed": 1, **shown},
        ]

    async def plan(self, *, text: str | None = None, number: int | None = None, prune: bool = False) -> Json:
        self.calls.append(("plan", {"text": text, "number": number, "prune": prune}))
        if self.refuses is not None:
            raise self.refuses
        return self.planned

    async def apply(self, **asked: Any) -> FakeOperation:
        self.calls.append(("apply", asked))
        operation = FakeOperation(f"op-{len(self.node.ops) + 1}", "apply", "")
        self.node.ops[operation.operation_id] = operation
        if self.fails is not None:
            operation.result.set_exception(self.fails)
        else:
            operation.result.set_result(self.outcome)
        return operation
