"""Preloading over HTTP: what is answered, written, shown and refused, on one real daemon."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import free_port, wait_until
from tests.system.daemons import Daemon, engine, in_time
from tests.system.nodes import alive

_STATUS = (
    "pool_id state live ready draining active_leases slots_total slots_free engine engine_version model_id device_mask"
    " crash_count restart_count last_error last_heartbeat_ms circuit_state pid url isolation"
)
_HANDOFF = "engine engine_version provisioning_mode url pool_id replica_id model flags schema_version pid device_mask slots_total"


@pytest.fixture(scope="module")
def daemon(session_dir: Path, closed_to_engines: str | None) -> Iterator[Daemon]:
    if closed_to_engines is not None:
        pytest.skip(closed_to_engines)
    served = Daemon(session_dir / "preload").start()
    yield served
    served.end()


@pytest.mark.parametrize("wrapped", [False, True], ids=["bare", "wrapped"])
def test_a_submitted_engine_is_preloaded_and_its_files_say_so(daemon: Daemon, wrapped: bool) -> None:
    pool = f"files-{wrapped}".lower()
    log = daemon.run / f"engine-{pool}.log"
    log.write_text("from before\n")
    body = engine("--odd", "--flag=2", "", "--odd", engine_version="v9", device_mask="0,1", slots_total=3, model_path="/m.gguf")
    code, answer = daemon.post(f"/v1/pools/{pool}/preload", {"prepared": body} if wrapped else body)
    assert code == 200 and answer.keys() == {"pool_id", "pid", "handoff_path"} and answer["pool_id"] == pool
    assert (daemon.run / f"{pool}.pid").read_text() == str(answer["pid"])
    argv = Path(f"/proc/{answer['pid']}/cmdline").read_bytes().decode().split("\0")[:-1]
    assert argv == [body["binary_path"], *body["flags"]], "the pid is the engine's own and its flags are verbatim"
    assert log.read_text().startswith("from before\n") and "listens on port" in log.read_text()

    latest = Path(answer["handoff_path"])
    assert latest == daemon.run / "engines/engine.json"
    handoff = json.loads(latest.read_text())
    assert handoff == json.loads((daemon.run / f"engines/{pool}-r0.json").read_text())
    assert set(_HANDOFF.split()) <= handoff.keys() and "\n  " in latest.read_text()
    assert (handoff["url"], handoff["flags"]) == (f"http://127.0.0.1:{body['port']}", body["flags"])
    assert (handoff["engine_version"], handoff["model"]["path"], handoff["slots_total"]) == ("v9", "/m.gguf", 3)

    status = daemon.status(pool)
    assert set(_STATUS.split()) <= status.keys()
    assert (status["state"], status["live"], status["ready"], status["draining"]) == ("ready", True, True, False)
    assert (status["slots_total"], status["slots_free"], status["active_leases"]) == (3, 3, 0)
    assert (status["engine_version"], status["device_mask"], status["pid"]) == ("v9", "0,1", answer["pid"])
    assert (status["crash_count"], status["restart_count"], status["last_error"]) == (0, 0, None)
    assert status["circuit_state"] == "closed" and abs(status["last_heartbeat_ms"] - time.time() * 1000) < 60_000
    assert {daemon.get(f"{prefix}/pools/{pool}/status")[1]["pid"] for prefix in ("", "/v1", "/v2")} == {answer["pid"]}
    assert daemon.get(f"/v1/pools/{pool}/health")[1]["ready"] is True

    assert daemon.post(f"/v1/pools/{pool}/preload", body)[1]["code"] == "ALREADY_READY"
    assert daemon.post(f"/v1/pools/{pool}/stop?wait=true")[0] == 200
    assert not alive(answer["pid"]) and daemon.status(pool)["state"] == "offline"
    assert not (daemon.run / f"{pool}.pid").exists() and not (daemon.run / f"engines/{pool}-r0.json").exists()


def test_an_unknown_pool_is_not_found_by_its_name(daemon: Daemon) -> None:
    for path in ("status", "health", "command", "leases", "logs", "crashes"):
        code, answer = daemon.get(f"/v1/pools/nobody/{path}")
        assert (code, answer["code"], answer["error"]) == (404, "POOL_NOT_FOUND", "pool nobody not found"), path
    for path in ("preload", "start", "drain", "leases", "hold"):
        assert daemon.post(f"/v1/pools/nobody/{path}")[0] == 404, path
    assert "nobody" not in [pool["pool_id"] for pool in daemon.get("/v1/pools")[1]]


@pytest.mark.parametrize(
    "body",
    [
        [], "x", 3, b"{", b"nul", b'{"port": 1, "port": 2}', b'{"port": NaN}', {}, {"prepared": []}, {"prepared": {}},
        {"binary_path": "/bin/true"}, {"port": 1}, engine(unknown=1), engine(port=70_000), engine() | {"port": True},
        engine() | {"port": "80"}, engine() | {"flags": "x"}, engine() | {"flags": [1]}, engine(host="0.0.0.0"),
        engine(replica_id="../x"), engine(env={"A=B": "x"}), engine(slots_total=0), engine(pool_id="another"),
        engine() | {"binary_path": "/bin/\0true"}, {"prepared": engine(), "pool_id": "bad"},
    ],
)  # fmt: skip
def test_a_body_that_is_no_engine_is_a_bad_request_that_leaves_no_pool(daemon: Daemon, body: Any) -> None:
    code, answer = daemon.post("/v1/pools/bad/preload", body)
    assert code == 400 and answer["message"] == answer["error"] and answer["message"].startswith("cannot")
    assert daemon.get("/v1/pools/bad/status")[0] == 404


@pytest.mark.parametrize("given", ["..%2fx", "%00", "..", ".", "a" * 300, "a%2Fb", "a%5Cb", "%e2%88%95", "a..b", "-x"])
def test_a_pool_id_that_could_be_a_path_is_refused(daemon: Daemon, given: str) -> None:
    code, answer = daemon.post(f"/v1/pools/{given}/preload", engine())
    assert code in (400, 404, 405), answer
    assert not [path for path in daemon.run.rglob("*") if path.name.startswith(("..", "a"))]


@pytest.mark.parametrize(("binary", "why"), [("/nowhere/engine", "nowhere/engine"), ("/etc/passwd", "not executable")])
def test_a_binary_that_cannot_be_run_fails_the_preload_and_leaves_nothing(daemon: Daemon, binary: str, why: str) -> None:
    pool = binary.rpartition("/")[2]
    code, answer = daemon.post(f"/v1/pools/{pool}/preload", engine() | {"binary_path": binary})
    assert code == 500 and answer["message"].startswith("preload failed: ") and why.lower() in answer["message"].lower()
    status = daemon.status(pool)
    assert (status["state"], status["live"], status["ready"], status["pid"]) == ("failed", False, False, None)
    assert "preload failed" in status["last_error"]
    assert not (daemon.run / f"{pool}.pid").exists()
    assert [line for line in daemon.lines("preload_failed") if line["pool_id"] == pool]


def test_an_engine_that_exits_at_once_fails_with_its_code_and_its_last_words_and_is_not_retried(daemon: Daemon) -> None:
    code, answer = in_time(10, lambda: daemon.post("/v1/pools/early/preload", engine("--exit-after", "0", "--exit-code", "7")))
    assert code == 500 and "health check failed" in answer["message"] and "7" in answer["message"]
    status = daemon.status("early")
    assert status["state"] == "failed" and "health check failed" in status["last_error"] and status["restart_count"] == 0
    assert not (daemon.run / "early.pid").exists()
    assert not [line for line in daemon.lines("backoff") if line["pool_id"] == "early"]


def test_a_port_that_another_program_holds_is_never_called_ready(daemon: Daemon) -> None:
    """The other program even answers 200 to everything."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()

        def answer() -> None:
            while True:
                try:
                    connection, _ = other.accept()
                except OSError:
                    return
                with connection:
                    connection.recv(4096)
                    connection.sendall(b'HTTP/1.1 200 OK\r\nContent-Length: 15\r\nConnection: close\r\n\r\n{"status":"ok"}')

        threading.Thread(target=answer, daemon=True).start()
        code, failed = daemon.post("/v1/pools/taken/preload", engine(port=other.getsockname()[1]))
        other.shutdown(socket.SHUT_RDWR)
    assert code == 500 and "in use" in failed["message"], failed
    assert not daemon.status("taken")["ready"] and daemon.status("taken")["state"] == "failed"


def test_status_answers_during_a_slow_preload_which_an_operation_follows(daemon: Daemon) -> None:
    code, operation = in_time(3, lambda: daemon.post("/v1/pools/slow/preload?wait=false", engine("--ready-after", "4")))
    assert code == 202 and operation["operation_id"] and operation["status"] == "running"
    daemon.until(lambda s: s["live"], "the engine to be started", "slow")
    status = in_time(2, lambda: daemon.status("slow"))
    assert (status["live"], status["ready"]) == (True, False) and status["preload"]["human"]
    assert (daemon.run / "slow.pid").exists() and not (daemon.run / "engines/slow-r0.json").exists()
    assert daemon.post("/v1/pools/slow/preload", engine())[1]["code"] == "OPERATION_IN_PROGRESS"
    lease = daemon.post("/v1/pools/slow/leases")
    assert (lease[0], lease[1]["code"]) == (503, "POOL_UNREADY")
    daemon.until(lambda s: s["ready"], "the pool to be ready", "slow")
    path = f"/operations/{operation['operation_id']}"
    wait_until(lambda: bool(daemon.get(f"/v1{path}")[1]["status"] == "succeeded"), "the operation to end", 15)
    assert daemon.get(f"/v1{path}") == daemon.get(f"/v1/pools/slow{path}")
    assert daemon.get(f"/v1{path}")[1]["outcome"]["pid"] == daemon.status("slow")["pid"]


def test_a_client_that_goes_away_does_not_stop_a_preload_and_delete_does(daemon: Daemon) -> None:
    body = json.dumps(engine("--ready-after", "0.6")).encode()
    with socket.create_connection(("127.0.0.1", daemon.port), timeout=5) as client:
        head = f"POST /v1/pools/left/preload HTTP/1.1\r\nHost: 127.0.0.1:{daemon.port}\r\nContent-Type: application/json\r\n"
        client.sendall(head.encode() + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
        wait_until((daemon.run / "left.pid").exists, "the engine to be started", 5)
    daemon.until(lambda s: s["ready"], "the pool to be ready without its client", "left")

    assert daemon.post("/v1/pools/cut/preload?wait=false", engine("--ready-after", "60"))[0] == 202
    wait_until((daemon.run / "cut.pid").exists, "the engine to be started", 5)
    pid = daemon.status("cut")["pid"]
    assert in_time(10, lambda: daemon.delete("/v1/pools/cut/preload?wait=true"))[0] == 200
    assert not alive(pid) and not (daemon.run / "cut.pid").exists()
    assert daemon.status("cut")["state"] == "offline" and not daemon.status("cut")["live"]
    assert daemon.delete("/v1/pools/cut/preload")[0] == 409
    running = [o for o in daemon.get("/v1/operations")[1] if o["status"] == "running"]
    assert running == [], "the cancelled preload's own operation has ended too"


def test_a_preload_that_failed_works_when_its_reason_is_gone(daemon: Daemon) -> None:
    body = engine(port=free_port())
    with socket.socket() as other:
        other.bind(("127.0.0.1", body["port"]))
        other.listen()
        assert daemon.post("/v1/pools/again/preload", body)[0] == 500
    code, answer = daemon.post("/v1/pools/again/preload", body)
    assert code == 200 and daemon.status("again")["last_error"] is None
    assert alive(answer["pid"])


def test_the_engine_runs_without_root_and_without_our_secrets(daemon: Daemon) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root to be given up")
    pid = daemon.preload("plain", "--print-env", env={"MINE": "1"})["pid"]
    fields = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":\t" in line)
    assert set(fields["Uid"].split()) != {"0"} and int(fields["CapEff"], 16) == 0 and fields["NoNewPrivs"] == "1"
    environ = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    assert b"MINE=1" in environ and not [entry for entry in environ if entry.startswith((b"PYTHONPATH", b"AUTH_"))]
