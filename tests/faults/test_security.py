"""Family I: tokens, pages, secrets, flags, users and text that is made to take long."""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
import urllib.request
from pathlib import Path
from urllib.parse import quote

import pytest

from pool_managerd.api.auth import Access
from pool_managerd.testing import hostile_engine
from tests.conftest import free_port, wait_until
from tests.faults.conftest import Make
from tests.faults.watched import Watched
from tests.gpu.nodes import pool, scripted
from tests.system.daemons import engine


def test_I1_without_the_right_token_nothing_is_told_or_done(daemon: Watched) -> None:
    good = str(daemon.token)
    for wrong in (None, "", "x", good[:-1], good + "x", good.upper(), good[:-1] + "\u00e9"):
        given = {} if wrong is None else {"Authorization": f"Bearer {wrong}".encode().decode("latin-1")}
        daemon.token = None
        for method, path in (("GET", "/v1/pools"), ("POST", "/v1/pools/p"), ("GET", "/v1/events")):
            assert daemon.call(method, path, None, given)[0] == 401, wrong
        daemon.token = good
    assert daemon.get("/v1/pools") == (200, [])


@pytest.mark.slow
def test_I1_how_much_of_a_token_is_right_does_not_show_in_the_time(daemon: Watched) -> None:
    import hashlib

    good = "t" * 48
    access = Access("127.0.0.1", token_digest=hashlib.sha256(good.encode()).digest())
    took: dict[int, list[int]] = {right: [] for right in (0, 12, 24, 36, 47)}
    for _ in range(20_000):
        for right, samples in took.items():
            header = f"Bearer {good[:right] + 'x' * (48 - right)}"
            began = time.perf_counter_ns()
            access.bears_token(header)
            samples.append(time.perf_counter_ns() - began)
    medians = [statistics.median(samples) for samples in took.values()]
    assert max(medians) < 1.15 * min(medians), medians


def test_I3_a_web_page_can_neither_read_nor_change(daemon: Watched) -> None:
    page = {"Origin": "http://evil.example"}
    for method in ("GET", "POST", "OPTIONS"):
        code, _ = daemon.call(method, "/v1/pools/p" if method == "POST" else "/v1/pools", None, page)
        assert code in (403, 405)
    assert daemon.call("GET", "/v1/pools", None, {"Host": f"evil.example:{daemon.port}"})[0] == 421
    code, _ = daemon.call("POST", "/v1/pools/p/preload", json.dumps(engine()).encode(), {"Content-Type": "text/plain"})
    assert code == 415 and daemon.get("/v1/pools") == (200, [])


def test_I5_a_secret_is_in_nothing_that_is_told_or_written(daemon: Watched) -> None:
    """The daemon's token is looked for after every row; here secrets of engines are, too, which print them and die."""
    key = "canary-of-an-engine-5f1e9a77"
    daemon.secrets.append(key)
    code = f"import os, sys; print('401 for', os.environ['HF_TOKEN'], flush=True); sys.exit(3)  # {free_port()}"
    port = free_port()
    body = {"binary_path": sys.executable, "port": port, "flags": ["-I", "-c", code], "env": {"HF_TOKEN": key}}
    assert daemon.post("/v1/pools/p/preload", body)[0] == 500
    assert daemon.post("/v1/pools/q/preload", {**engine(env={"HF_TOKEN": key}), "typo": 1})[0] == 400
    daemon.preload("runs", env={"HF_TOKEN": key})
    environ = Path(f"/proc/{daemon.status('runs')['pid']}/environ").read_bytes()
    assert key.encode() in environ and str(daemon.token).encode() not in environ
    (daemon.run / "engine-p.log").unlink()  # an engine's own log is raw: what it printed is its own affair
    assert "401 for ***" in json.dumps(daemon.get("/v1/crashes")[1])


@pytest.mark.parametrize(
    "flags",
    [
        ["--host", "0.0.0.0"],
        ["--port", "1"],
        ["--api-key-file", "/etc/shadow"],
        ["--alias=x", "--host=::"],
        ["-m", "/etc/shadow"],
    ],
)
def test_I7_a_configured_pool_takes_no_flags_that_open_doors(
    make: Make, open_dir: Path, tiny_model: Path, flags: list[str]
) -> None:
    row = pool("p", tiny_model, scripted(open_dir), provisioning={"flags": flags})
    daemon = make(f"pools: {json.dumps([row])}\n")
    process = daemon.launch()
    wait_until(lambda: process.poll() is not None or bool(daemon.lines("serving")), "the daemon to decide", 20)
    if process.poll() is None:
        wait_until(lambda: daemon.get("/health")[0] == 200, "the daemon", 10)
        daemon.until(lambda s: not s["ready"] and bool(s["last_error"]), "the pool to be refused")
        assert any(flag.split("=")[0] in daemon.status()["last_error"] for flag in flags), daemon.status()["last_error"]
        assert daemon.terminate() == 0
    else:
        assert process.returncode == 2 and any(flag.split("=")[0] in daemon.text() for flag in flags), daemon.text()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives engines users of their own")
def test_I9_an_engine_reads_neither_state_nor_tokens_nor_anothers_files(daemon: Watched, open_dir: Path) -> None:
    assert daemon.process is not None
    secret = open_dir / "secret"
    secret.write_text("root's alone")
    secret.chmod(0o600)
    other = daemon.preload("other")["pid"]
    port = free_port()
    flags = ["--port", port, "--daemon", daemon.process.pid, "--other", other, "--state", daemon.state, "--runtime", daemon.run,
             "--secret-file", secret]  # fmt: skip
    script = ["-I", hostile_engine.__file__, *map(str, flags)]
    assert daemon.post("/v1/pools/hostile/preload", {"binary_path": sys.executable, "flags": script, "port": port})[0] == 200
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/report", timeout=30) as told:
        walls = json.loads(told.read())["walls"]
    assert [wall for wall, through in walls.items() if through] == []


BOMBS = {
    "aliases": "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"{chr(98 + n)}: &{chr(98 + n)} [{','.join([f'*{chr(97 + n)}'] * 9)}]\n" for n in range(9)
    ),
    "object": "pools: !!python/object/apply:os.system ['touch /tmp/owned']\n",
    "deep": "x: " + "[" * 5000 + "]" * 5000 + "\n",
    "huge": "# " + "x" * (64 << 20) + "\n",
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_I11_a_configuration_that_is_a_bomb_is_refused_soon(make: Make, name: str) -> None:
    daemon = make()
    daemon.config.write_text(BOMBS[name])
    began = time.monotonic()
    assert daemon.launch().wait(30) == 2
    assert time.monotonic() - began < 8 and "Traceback" not in daemon.text()
    assert not Path("/tmp/owned").exists()


def test_I13_text_that_is_made_to_take_long_is_read_in_no_time(daemon: Watched) -> None:
    daemon.post("/v1/pools/p")
    for hurts in ("a" * 5000 + "!", "((a+)+)+$" * 300, "%" * 3000, "0" * 4000 + "x", "\u202e" * 500):
        quoted = quote(hurts, safe="")[:7000]
        for path in (
            f"/v1/events?follow=false&after={quoted}",
            f"/v1/pools/p/logs?since={quoted}",
            f"/v1/events?follow=false&pool={quoted}",
        ):
            began = time.monotonic()
            code, _ = daemon.get(path)
            assert code < 500 and time.monotonic() - began < 0.5, path[:80]
