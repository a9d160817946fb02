"""``purge``: nothing is deleted that was not shown and meant."""

from __future__ import annotations

import json
import sys

import pytest

from pool_managerd.core.purge import PurgeRequest
from pool_managerd.errors import RequestError
from tests.cli.test_commands import Invoke, Server

MIB = 1 << 20


def test_a_dry_run_shows_what_would_go_and_asks_for_nothing_else(invoke: Invoke, server: Server) -> None:
    code, out, err = invoke("purge", "demo", "--cache", "--dry-run")
    assert (code, err) == (0, "") and server.node.calls == []
    assert out.splitlines() == [
        "drains and stops its engine", "deletes /run/cache/demo (4 MiB)", "deletes /run/work/demo (4 MiB)", "frees 8 MiB",
    ]  # fmt: skip
    assert "stops its engine at once" in invoke("purge", "demo", "--force", "--dry-run")[1]
    assert json.loads(invoke("purge", "demo", "--dry-run", "-o", "json")[1])["would_free_bytes"] == 4 * MIB


def test_what_is_meant_is_done_and_told(invoke: Invoke, server: Server) -> None:
    code, out, _ = invoke("purge", "demo", "--yes", "--force", "--no-drain")
    assert code == 0 and out == "deleted /run/work/demo (4 MiB)\npool demo is purged: 4 MiB freed\n"
    assert server.node.purges[-1] == PurgeRequest("demo", drain_first=False, force=True)
    assert server.node.calls == [("purge", "demo")]


def test_models_and_engine_are_asked_for_by_name(invoke: Invoke, server: Server) -> None:
    server.node.pools["demo"] |= {"model_ref": "file:models/tiny.gguf"}
    assert invoke("purge", "demo", "--models", "--engine", "--yes")[0] == 0
    assert server.node.purges[-1] == PurgeRequest("demo", purge_engine=True, purge_models=("file:models/tiny.gguf",))


def test_nobody_is_asked_where_nobody_is(invoke: Invoke, server: Server) -> None:
    code, _, err = invoke("purge", "demo")
    assert code == 2 and "write --yes" in err and server.node.calls == []


@pytest.mark.parametrize("answer", ["y", "n"])
def test_whoever_is_asked_has_seen_it(invoke: Invoke, server: Server, monkeypatch: pytest.MonkeyPatch, answer: str) -> None:
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("typer.confirm", lambda _: answer == "y")
    code, out, _ = invoke("purge", "demo")
    assert "frees 4 MiB" in out and server.node.calls == ([("purge", "demo")] if answer == "y" else [])
    assert code == (0 if answer == "y" else 1)


def test_a_refusal_says_why(invoke: Invoke, server: Server) -> None:
    server.node.fail_next = RequestError("cannot purge pool 'demo': a file of yours", code="NOT_OURS", status=409, hint="rm it")
    assert invoke("purge", "demo", "--yes") == (4, "", "cannot purge pool 'demo': a file of yours\nhint: rm it\n")
