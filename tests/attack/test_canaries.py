"""Secrets planted wherever one may stand, and looked for in everything that the daemon says, keeps or passes on."""

from __future__ import annotations

import http.client
import json
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from pool_managerd.api.openapi import document
from tests.conftest import wait_until
from tests.system.daemons import Daemon, engine

CANARY = "canary7f3a9c1e"
TOKEN = f"{CANARY}-token-0123456789abcdef0123456789"
OF_THE_DAEMON = {
    "AUTH_TOKEN": TOKEN, "HF_TOKEN": f"hf_{CANARY}", "OPENAI_API_KEY": f"sk-{CANARY}", "AWS_SECRET_ACCESS_KEY": f"{CANARY}/aws",
    "HTTPS_PROXY": f"http://me:{CANARY}@192.0.2.1:3128", "DATABASE_URL": f"postgres://u:{CANARY}@h/x",
    "MY_PASSWORD": f"{CANARY}-pw",
}  # fmt: skip
OF_A_REQUEST = {
    "Authorization": f"Bearer {CANARY}-wrong-one-0123456789abcdef", "Cookie": f"session={CANARY}", "X-Api-Key": CANARY,
    "Proxy-Authorization": f"Basic {CANARY}", "X-Forwarded-For": CANARY, "Referer": f"http://h/?token={CANARY}",
    "User-Agent": CANARY, "traceparent": CANARY,
}  # fmt: skip
PATHS = sorted(path for path, operations in document()["paths"].items() if path.startswith("/v1") and "get" in operations)


@pytest.fixture
def daemon(open_dir: Path) -> Iterator[Daemon]:
    started = Daemon(open_dir / "d", **OF_THE_DAEMON)
    started.token = TOKEN
    yield started.start()
    started.end()


def everything_said(daemon: Daemon) -> dict[str, str]:
    """Every read of the document for the pool ``p``, with the answer's head, by path."""
    said: dict[str, str] = {}
    for template in PATHS:
        path = template.format(pool_id="p", operation_id="x", lease_id="x", device="0")
        path += "?follow=false&after=0" if path.endswith("/events") else ""
        connection = http.client.HTTPConnection("127.0.0.1", daemon.port, timeout=15)
        connection.request("GET", path, headers={"Authorization": f"Bearer {TOKEN}"})
        answer = connection.getresponse()
        said[path] = f"{answer.getheaders()} {answer.read().decode()}"
        connection.close()
    return said


def kept_and_passed_on(daemon: Daemon) -> dict[str, str]:
    """Its log, its files but for the raw log of the engine, and what any user reads in /proc of it and of what it started."""
    assert daemon.process is not None
    found = {"the log": daemon.text()}
    for path in (*daemon.run.rglob("*"), *daemon.state.rglob("*")):
        if path.is_file() and not path.name.startswith("engine-") and path.name != "control.token":
            found[str(path)] = path.read_bytes().decode("latin-1")
    for pid in (daemon.process.pid, *descendants(daemon.process.pid)):
        place = Path(f"/proc/{pid}")
        name = place.joinpath("comm").read_text().strip()
        found[f"the command line of {name}"] = place.joinpath("cmdline").read_bytes().decode("latin-1")
        with suppress(PermissionError):  # shown to root alone, which is as good
            if name.startswith("pm-"):
                found[f"the environment of {name}"] = place.joinpath("environ").read_bytes().decode("latin-1")
    return found


def descendants(pid: int) -> list[int]:
    children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [one for child in children for one in (child, *descendants(child))]


def with_canary(found: dict[str, str]) -> list[str]:
    return sorted(place for place, text in found.items() if CANARY in text)


def test_no_secret_of_the_daemon_of_a_request_or_of_an_engine_is_told_kept_or_passed_on(daemon: Daemon) -> None:
    asked = ("/v1/pools", "/v1/crashes", "/v1/nothing", "/health")
    refused = [daemon.call("GET", path, headers=OF_A_REQUEST) for path in asked]
    refused += [daemon.call("POST", f"/v1/pools/p/preload?access_token={CANARY}", {}, OF_A_REQUEST)]
    assert [status for status, _ in refused] == [401, 401, 401, 200, 401]
    secret: dict[str, Any] = {"env": {"API_KEY": f"{CANARY}-env", "NOT_KNOWN": f"{CANARY}-odd"}, "slots_total": 2}
    code, answer = daemon.post("/v1/pools/p/preload", engine(**secret))
    assert code == 200, answer
    lease = {"holder": "h", "idempotency_key": "k1"}
    assert daemon.post("/v1/pools/p/leases", lease)[0] == 201
    first = everything_said(daemon) | kept_and_passed_on(daemon)
    assert with_canary(first | {"refusals": json.dumps(refused), "the answer": json.dumps(answer)}) == []
    assert os.geteuid() != 0 or any(name.startswith("the environment of pm-shim") for name in first)

    crashing = engine("--exit-after", "0", "--exit-code", "3", **secret)
    daemon.post("/v1/pools/p/stop?wait=true")
    code, answer = daemon.post("/v1/pools/p/preload", crashing)
    assert code == 500
    wait_until(lambda: daemon.get("/v1/crashes")[1], "a crash report", 10)
    assert with_canary(everything_said(daemon) | kept_and_passed_on(daemon) | {"the answer": json.dumps(answer)}) == []


def test_an_engine_gets_no_secret_of_the_daemon(daemon: Daemon) -> None:
    pid = daemon.preload("p")["pid"]
    environment = Path(f"/proc/{pid}/environ").read_bytes().decode("latin-1")
    assert CANARY not in environment
    assert "PATH=" in environment
