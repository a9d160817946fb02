"""``bench``: what it draws, and what becomes of it when nobody waits any more."""

from __future__ import annotations

import json
import signal
from typing import Any

import pytest

from pool_managerd.cli import bench as command
from pool_managerd.cli.bench import chart
from pool_managerd.cli.client import Daemon
from pool_managerd.errors import RequestError
from tests.api.fake_node import BENCH
from tests.cli.test_commands import Invoke, Server
from tests.conftest import interrupts_heard


def test_what_was_measured_is_drawn_in_80_columns(invoke: Invoke, server: Server) -> None:
    code, out, _ = invoke("bench", "demo", "--tokens", "8", "--runs", "2")
    assert code == 0 and server.node.benched == [("demo", 8, None, 2)]
    lines = out.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[:3] == ["pool demo: tiny", "on llamacpp b1, slots: 4", "bench of 8 tokens behind a prompt of 512, 2 runs"]
    assert "first token, p50             12.0 ms       40.0 ms" in lines
    assert "prompt tokens/s                900.5             -" in lines
    alone, full = lines[-2:]
    assert alone.split()[0] == "alone" and alone.count("█") * 2 == pytest.approx(full.count("█"), abs=2)
    assert full.strip().startswith("4 at once █") and full.endswith(" 160.0")


def test_a_pool_with_one_slot_has_one_column(invoke: Invoke) -> None:
    lines = chart({**BENCH, "full": None})
    assert lines[4].split() == ["alone"] and lines[-1].split()[0] == "alone" and max(map(len, lines)) <= 80


def test_one_that_was_too_short_for_a_baseline_says_so(invoke: Invoke) -> None:
    longer = "bench of 128 tokens behind a prompt of 512, 3 runs"
    lines = chart({**BENCH, "longer_bench": longer})
    assert lines[-2:] == ["not the pool's baseline: that stays what a longer bench has measured", f"({longer})"]


def test_json_is_the_whole_outcome(invoke: Invoke) -> None:
    code, out, _ = invoke("bench", "demo", "-o", "json")
    assert code == 0 and json.loads(out) == {**BENCH, "pool_id": "demo"}


def test_whoever_breaks_it_off_ends_it_in_the_daemon(invoke: Invoke, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> bool:
        raise KeyboardInterrupt

    server.node.auto = False
    monkeypatch.setattr(command, "wait_for", interrupted)
    code, _, err = invoke("bench", "demo")
    assert code == 130 and err == "the bench of demo was broken off\n" and ("cancel_bench", "demo") in server.node.calls


def test_an_interrupt_while_it_is_asked_for_is_heard_when_there_is_something_to_break_off(
    invoke: Invoke, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = Daemon.request

    def interrupted(self: Daemon, method: str, *path: str, **more: Any) -> Any:
        if method == "POST":
            signal.raise_signal(signal.SIGINT)
        return request(self, method, *path, **more)

    server.node.auto = False
    monkeypatch.setattr(Daemon, "request", interrupted)
    with interrupts_heard():
        code, _, err = invoke("bench", "demo")
    assert (code, err) == (130, "the bench of demo was broken off\n")
    assert server.node.calls == [("bench", "demo"), ("cancel_bench", "demo")]


def test_a_refusal_and_a_failure_say_why(invoke: Invoke, server: Server) -> None:
    server.node.fail_next = RequestError("cannot bench: one lease", code="POOL_IN_USE", status=409, hint="wait")
    assert invoke("bench", "demo") == (4, "", "cannot bench: one lease\nhint: wait\n")
    assert invoke("bench", "demo", "--tokens", "1")[0] == 2
