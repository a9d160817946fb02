"""``crashes``: a table that is read at 80 columns, one pool's newest report below it, and all of it as JSON."""

from __future__ import annotations

import json
import sys

import pytest

from tests.cli.test_commands import Invoke, Server


def at_80_columns(monkeypatch: pytest.MonkeyPatch, columns: int = 80) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)


def test_all_crashes_are_a_table_with_class_and_cause(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    at_80_columns(monkeypatch)
    code, out, _ = invoke("crashes")
    head, row = out.splitlines()
    assert code == 0 and max(len(line) for line in (head, row)) <= 80
    for word in ("demo", "code 1", "bad_flags", "error: invalid"):
        assert word in row
    assert "WHEN" in head and "CLASS" in head


@pytest.mark.parametrize(("columns", "there"), [(80, ["CLASS"]), (120, ["WHEN", "UPTIME", "EXIT", "CLASS"])])
def test_what_an_engine_said_is_read_at_any_width(
    invoke: Invoke, server: Server, monkeypatch: pytest.MonkeyPatch, columns: int, there: list[str]
) -> None:
    error = "signal SIGILL: this engine build uses CPU instructions that this machine lacks"
    crash = {"pool_id": "mistral-large-instruct", "crash_class": "illegal_instruction", "ts_ms": 1_795_000_000_000,
             "signal": "SIGILL", "uptime_seconds": 4_000.0, "last_error": error}  # fmt: skip
    server.node.crashes = lambda pool_id=None: [crash]
    at_80_columns(monkeypatch, columns)
    head, *rows = invoke("crashes")[1].splitlines()
    assert max(len(line) for line in (head, *rows)) <= columns and len(rows) == 2
    at = head.index("WHAT")
    assert " ".join(row[at:].strip() for row in rows).startswith("signal SIGILL: this engine build uses CPU instructions that")
    assert all(word in head for word in there) and "illegal_instruction" in rows[0]
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False)
    assert error in invoke("crashes")[1], "whole, in one line, where there is no terminal"


def test_one_pools_crashes_end_with_the_newest_in_full(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    at_80_columns(monkeypatch)
    _, out, _ = invoke("crashes", "demo")
    lines = out.splitlines()
    assert lines[3] == "The last one:"
    told = {line[:11].strip(): line[13:] for line in lines[4:] if line[:1].strip()}
    assert told["class"] == "bad_flags" and told["exit record"] == "exit code 1, by itself"
    assert told["log"] == "error: invalid argument: --ctx-siz (byte 40 of its log)"
    assert told["done"] == "starting it again in 1 s" and told["remedy"].startswith("Correct the flag")
    assert told["log ends"] == "loading" and "pool-managerd command demo" in " ".join(out.split())


def test_machines_get_every_field(invoke: Invoke, server: Server) -> None:
    assert json.loads(invoke("crashes", "demo", "-o", "json")[1]) == server.node.crashes("demo")


def test_a_status_that_is_not_ready_says_what_the_last_crash_was(invoke: Invoke, server: Server) -> None:
    server.node.add("broken", state="backoff", ready=False, live=False, last_crash=server.node.crashes("broken")[0])
    server.node.add("fine", last_crash=server.node.crashes("fine")[0])
    assert "bad_flags: Correct the flag" in invoke("status", "broken")[1]
    assert "bad_flags" not in invoke("status", "fine")[1]
