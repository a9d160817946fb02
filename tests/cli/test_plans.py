"""Plans as a person reads them: what a request for a model would lead to (``explain --model``), what a reload would do."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pool_managerd.cli.reload import show_plan
from pool_managerd.errors import RequestError
from tests.cli.test_commands import Invoke, Server
from tests.cli.test_crashes import at_80_columns

ROOM: dict[str, Any] = {
    "pool_id": "b", "state": "offline", "load_ms": 2000, "waiting": 0, "refused": None, "hint": None,
    "would": "a request for pool 'b' would start it, which takes about 2 s, once a, c and another pool with a long name must end",
    "stops": [{"pool_id": "a", "action": "wait for its requests", "in_flight": 3, "idle_ms": 0, "stop_ms": 2000,
               "load_again_ms": 90_000}],
}  # fmt: skip


def plans(server: Server, answer: dict[str, Any] | Exception) -> None:
    async def plan(model: str) -> dict[str, Any]:
        if isinstance(answer, Exception):
            raise answer
        return {"model": model, **answer}

    server.node.plan_acquire = plan


def test_a_plan_fits_into_80_columns(invoke: Invoke, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    plans(server, ROOM)
    whole = invoke("explain", "--model", "b")[1]
    at_80_columns(monkeypatch)
    code, out, _ = invoke("explain", "--model", "b")
    first, second, *rest = out.splitlines()
    assert code == 0 and max(map(len, (first, second, *rest))) <= 80
    assert second.startswith("  ") and " ".join(out.split()) == " ".join(whole.split())


def test_a_model_that_there_is_not_would_be_refused(invoke: Invoke, server: Server) -> None:
    plans(server, RequestError("model 'x' not found", code="MODEL_NOT_FOUND", status=404, hint="models here: a, b"))
    code, out, err = invoke("explain", "--model", "x")
    assert (code, err) == (1, "")
    assert out == "A request for 'x' would be refused: model 'x' not found\n  hint: models here: a, b\n"
    assert json.loads(invoke("explain", "--model", "x", "-o", "json")[1])["refused"] == "model 'x' not found"


def test_what_would_be_refused_exits_1(invoke: Invoke, server: Server) -> None:
    would = "a request for pool 'b' would be refused: cannot use model file:b.gguf: there is no such file"
    plans(server, {**ROOM, "stops": [], "would": would, "refused": "cannot use model file:b.gguf", "hint": "put it there"})
    code, out, _ = invoke("explain", "--model", "b")
    assert code == 1 and out == f"{would[0].upper()}{would[1:]}\n  hint: put it there\n"


def test_a_reload_whose_flags_are_many_fits_into_80_columns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    old = [word for number in range(12) for word in (f"--flag-{number}", str(number))]
    why = "the engine can sleep while the new one loads, and both do not run side by side: cannot start pool b: it needs 8 GiB"
    plan = {
        "strategy": "sleep_old", "why": why, "forecast_downtime_ms": None, "vram": {"where": "on GPU 0"},
        "changes": [{"key": "provisioning.flags", "old": old, "new": [*old, "--one-more"]}],
        "steps": ["put the engine to sleep, and see on the GPUs that its memory is free: where it is not, more time passes"],
    }  # fmt: skip
    at_80_columns(monkeypatch)
    show_plan(plan)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80 and "--one-more" in " ".join(lines)


def test_a_pool_that_was_evicted_for_whatever_reason_is_said_to_start_on_demand(invoke: Invoke, server: Server) -> None:
    server.node.add("idle", state="offline", ready=False, live=False, desired="evicted")
    assert "desired" in (out := invoke("status", "idle")[1]) and "stopped for now; it starts on demand" in out
