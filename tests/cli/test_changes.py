"""Changes: what is so already is a success, several pools go their own ways, and waiting ends as it was asked to."""

from __future__ import annotations

import json
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pool_managerd.cli import progress
from pool_managerd.cli.progress import wait_for
from pool_managerd.errors import RequestError
from tests.cli.test_commands import Invoke, Server
from tests.conftest import wait_until


def refusal(code: str, message: str = "cannot do that", status: int = 409) -> RequestError:
    return RequestError(message, code=code, status=status)


def after(server: Server, condition: Callable[[], bool], act: Callable[[], object]) -> threading.Thread:
    """Do ``act`` in the server's loop once ``condition`` holds."""

    def run() -> None:
        wait_until(condition, "the command to get so far")
        server.soon(act)

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def test_a_preload_of_a_ready_pool_is_a_success_and_says_where_it_answers(invoke: Invoke, server: Server) -> None:
    server.node.fail_next = refusal("ALREADY_READY")
    code, out, err = invoke("preload", "demo")
    assert (code, out, err) == (0, "preload of pool demo: succeeded\nurl  http://127.0.0.1:8080\npid  4242\n", "")


def test_a_submitted_engine_is_not_what_runs_already(invoke: Invoke, server: Server, tmp_path: Path) -> None:
    (tmp_path / "engine.json").write_text('{"binary_path": "/bin/engine"}')
    server.node.fail_next = refusal("ALREADY_READY")
    assert invoke("preload", "demo", "--file", "engine.json")[0] == 4


def test_a_drain_that_is_waited_for_says_what_is_left_and_until_when_in_steps() -> None:
    pool = {"pool_id": "p", "state": "draining", "drain": {"left": 3, "requests": 0, "remaining_ms": 21_400}}
    assert progress.sentence(pool) == "p: draining, 3 requests left, about 20 s to the deadline"
    pool["drain"] = {"left": 1, "requests": 1, "remaining_ms": 0}
    assert progress.sentence(pool) == "p: draining, one request left, about 0 ms to the deadline"
    assert progress.sentence({"pool_id": "p", "state": "ready", "drain": None}) == "p: ready"


def test_a_preload_joins_the_start_that_is_under_way(invoke: Invoke, server: Server) -> None:
    server.node.pools["demo"] |= {"ready": False, "state": "provisioning", "preload": {"human": "Verifying the model file"}}
    server.node.fail_next = refusal("OPERATION_IN_PROGRESS")
    assert invoke("preload", "demo")[0] == 0
    assert server.node.calls == [("start", "demo")]


def test_undraining_what_is_not_draining_is_a_success_and_what_is_drained_a_refusal(invoke: Invoke, server: Server) -> None:
    server.node.fail_next = refusal("INVALID_PARAMS")
    assert invoke("undrain", "demo")[0] == 0
    server.node.pools["demo"] |= {"drained": True, "state": "offline", "ready": False}
    server.node.fail_next = refusal("INVALID_PARAMS")
    assert invoke("undrain", "demo")[0] == 4


def test_every_other_refusal_stays_one(invoke: Invoke, server: Server) -> None:
    for command in ("start", "preload", "restart", "hold"):
        server.node.fail_next = refusal("POOL_HELD", "cannot start pool 'demo': it is held; release it first")
        assert invoke(command, "demo")[0] == 4, command


@pytest.mark.parametrize("command", ["start", "preload", "restart"])
def test_the_url_stands_where_a_person_looks_for_it(invoke: Invoke, command: str) -> None:
    assert "url  http://127.0.0.1:8080\n" in invoke(command, "demo")[1]
    assert json.loads(invoke(command, "demo", "-o", "json")[1])["outcome"]["url"] == "http://127.0.0.1:8080"


def test_several_pools_are_changed_in_one_go_each_once(invoke: Invoke, server: Server) -> None:
    server.node.add("other")
    code, out, _ = invoke("stop", "other", "demo", "other")
    assert (code, out) == (0, "stop of pool other: succeeded\nstop of pool demo: succeeded\n")
    assert server.node.calls == [("stop", "other"), ("stop", "demo")]
    code, out, _ = invoke("hold", "--all", "-o", "json")
    assert (code, [answer["pool_id"] for answer in json.loads(out)]) == (0, ["demo", "other"])


def test_the_others_go_on_when_one_of_several_fails_and_the_worst_end_is_the_exit_code(invoke: Invoke, server: Server) -> None:
    server.node.add("other")
    code, out, err = invoke("start", "demo", "nope", "other")
    assert code == 4 and "start of pool demo: succeeded" in out and "start of pool other: succeeded" in out
    assert err.splitlines() == ["pool nope not found", "hint: the pools are: demo, other"]


def test_all_of_no_pools_is_nothing_to_do(invoke: Invoke, server: Server) -> None:
    server.node.pools.clear()
    assert invoke("drain", "--all") == (0, "", "there are no pools\n")
    assert invoke("status") == (0, "no pools\n", "")
    assert invoke("wait", "--all")[0] == 0


def test_an_id_that_is_not_known_is_answered_with_those_that_are_and_the_one_meant(invoke: Invoke, server: Server) -> None:
    for command in ("status", "start", "logs", "explain", "command", "leases", "crashes", "rm", "wait"):
        code, _, err = invoke(command, "dmeo")
        assert (code, err.splitlines()) == (4, ["pool dmeo not found", "hint: did you mean demo? the pools are: demo"]), command
    invoke("start", "demo")
    assert "the newest operations are: op-1" in invoke("operations", "op-7")[2]
    assert "hint: the devices are: 0" in invoke("devices", "cordon", "77")[2]
    server.node.pools.clear()
    assert invoke("status", "x")[2].splitlines() == ["pool x not found", "hint: there are no pools"]


def test_what_was_not_waited_for_can_be_looked_up(invoke: Invoke, server: Server) -> None:
    server.node.auto = False
    invoke("start", "demo", "--no-wait")
    code, out, _ = invoke("operations", "op-1")
    assert (code, "status     running" in out) == (0, True)
    server.soon(server.node.ops["op-1"].result.set_exception, refusal("X", "preload failed: no such file"))
    wait_until(server.node.ops["op-1"].result.done, "the operation to end")
    code, out, _ = invoke("operations", "op-1")
    assert (code, "preload failed: no such file" in out) == (1, True)
    assert "op-1" in invoke("operations")[1]
    assert json.loads(invoke("operations", "-o", "json")[1])[0]["operation_id"] == "op-1"


def test_a_pool_is_forgotten(invoke: Invoke, server: Server) -> None:
    server.node.add("other")
    assert invoke("rm", "other")[:2] == (0, "pool other is forgotten\n")
    assert "other" not in server.node.pools


def test_status_of_all_is_ready_when_all_are(invoke: Invoke, server: Server) -> None:
    server.node.add("other")
    code, out, _ = invoke("status")
    assert (code, out.count("state ")) == (0, 2)
    server.node.pools["other"]["ready"] = False
    code, out, _ = invoke("status", "-o", "json")
    assert (code, [pool["pool_id"] for pool in json.loads(out)]) == (1, ["demo", "other"])
    code, out, err = invoke("status", "demo", "nope")
    assert (code, "demo" in out, "nope" in err) == (4, True, True)


@pytest.mark.parametrize("alias", ["ps", "ls"])
def test_what_other_tools_call_it_lists_the_pools_too(invoke: Invoke, alias: str) -> None:
    assert invoke(alias) == invoke("pools")
    assert invoke(alias, "-o", "json") == invoke("pools", "-o", "json")


def test_waiting_ends_when_the_pool_is_as_it_is_wanted(invoke: Invoke, server: Server) -> None:
    pool = server.node.pools["demo"]
    assert invoke("wait", "demo")[:2] == (0, "pool demo is ready\n")
    pool |= {"ready": False, "state": "starting"}
    ender = after(server, lambda: True, lambda: pool.update(ready=True, state="ready"))
    assert invoke("wait", "demo", "--for=ready", "--timeout", "20s")[0] == 0
    ender.join()
    pool |= {"ready": False, "live": False, "drained": True, "state": "offline"}
    for goal in ("down", "drained"):
        assert invoke("wait", "demo", "--for", goal, "--timeout", "0")[0] == 0


def test_a_wait_that_is_too_long_or_in_vain_is_a_no(invoke: Invoke, server: Server) -> None:
    code, _, err = invoke("wait", "demo", "--for", "down", "--timeout", "0")
    assert (code, err) == (1, "cannot wait longer than 0 for --for=down: demo is ready\n")
    server.node.pools["demo"] |= {"ready": False, "live": False, "state": "failed", "last_error": "no such file"}
    code, _, err = invoke("wait", "demo")
    assert (code, err) == (1, "cannot wait for pool demo: it has failed: no such file\n")


@pytest.mark.parametrize("which", ["demo", "--all"])
def test_a_daemon_that_is_not_up_yet_is_waited_for(invoke: Invoke, which: str) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    bind = f"127.0.0.1:{listener.getsockname()[1]}"
    up: list[Server] = []

    def come_up_behind_the_first_question() -> None:
        with listener:
            listener.accept()[0].close()
        up.append(Server(bind=bind))

    coming = threading.Thread(target=come_up_behind_the_first_question)
    coming.start()
    code, out, err = invoke("wait", which, "--timeout", "20s", "--url", f"http://{bind}")
    coming.join()
    up[0].close()
    assert (code, out) == (0, "pool demo is ready\n")
    assert err.startswith(f"waiting for the daemon: cannot reach the daemon at http://{bind}: ")


def test_a_daemon_that_never_comes_up_is_told_at_the_end_of_the_wait(invoke: Invoke) -> None:
    code, _, err = invoke("wait", "demo", "--timeout", "0", "--url", "http://127.0.0.1:1")
    assert code == 3
    assert err.startswith("cannot wait longer than 0 for --for=ready: cannot reach the daemon at http://127.0.0.1:1")


def test_what_is_waited_for_shows_how_long_it_takes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    moments = iter(range(0, 100, 3))
    monkeypatch.setattr(time, "monotonic", lambda: next(moments))
    monkeypatch.setattr(progress, "POLL_S", 0)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "60")
    left = [["demo: loading\x1b[2J " + "x" * 90, "other: loading"], ["demo: loading"], []]
    assert wait_for(lambda: left.pop(0))
    shown = capsys.readouterr().err
    assert "  3 s  demo: loading" in shown and "  6 s  demo: loading" in shown and "\x1b[2J" not in shown
    assert shown.endswith("\r\x1b[K") and all(len(line) < 66 for line in shown.split("\r"))


@pytest.mark.parametrize("kind", ["stop", "evict"])
def test_what_was_down_is_said_to_have_been(invoke: Invoke, server: Server, kind: str) -> None:
    server.node.more_of_outcomes = {"unchanged": True}
    assert invoke(kind, "demo")[1].startswith(f"{kind} of pool demo: succeeded; nothing was to stop: it was down")
