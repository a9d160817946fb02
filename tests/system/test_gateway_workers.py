"""A gateway of several processes on one port, with a real daemon and a real engine: one gateway to whoever comes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from pool_managerd.gateway.keys import KeyFile
from pool_managerd.runtime import procfs
from tests.conftest import wait_until
from tests.system.nodes import alive
from tests.system.test_gateway import Home

ONE_TOKEN = {"model": "smol", "prompt": "a", "max_tokens": 1}


@pytest.fixture
def home(open_dir: Path, smol_model: Path) -> Iterator[Home]:
    made = Home(open_dir / "home", smol_model, gateway=", workers: 3", slots=4)
    yield made
    made.end()


def workers(home: Home) -> list[int]:
    return sorted(procfs.children(home.gateway_pid()))


def counted(home: Home) -> dict[str, float]:
    """Requests that were started, by worker."""
    with urllib.request.urlopen(f"{home.url}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    return {worker: float(number) for worker, number in re.findall(r'tasks_started_total\{.*worker="(\d)"\} (\S+)', text)}


def test_whoever_is_asked_knows_of_all(home: Home) -> None:
    home.start()
    with ThreadPoolExecutor(12) as pool:
        codes = list(pool.map(lambda _: home.ask("POST", "/v1/completions", ONE_TOKEN)[0], range(36)))
    assert codes == [200] * 36 and len(home.lines("spawn")) == 1, "one start for all"
    assert sum(counted(home).values()) == 36 and len(counted(home)) > 1
    rows = home.ask("GET", "/v1/requests")[1]
    assert len(rows) == 36 and [row["state"] for row in rows] == ["ended"] * 36
    streams = [home.tokens(2000) for _ in range(3)]
    for stream in streams:
        next(stream)
    live = [row for row in home.ask("GET", "/v1/requests")[1] if row["state"] == "running"]
    assert len(live) == 3
    for row in live:
        assert home.ask("DELETE", f"/v1/requests/{row['request_id']}") == (
            200,
            {"request_id": row["request_id"], "cancelled": True},
        )
    for stream in streams:
        assert b"cancelled" in list(stream)[-1]
    assert home.ask("DELETE", "/v1/requests/nobody")[0] == 404
    home.ask("POST", "/v1/completions", ONE_TOKEN)
    assert home.ask("POST", "/api/models/unload/smol") == (200, {"msg": "ok"}), "whichever of them keeps a lease"
    wait_until(lambda: not home.status("smol")["live"], "it to be unloaded", 15)


def test_a_worker_that_is_killed_is_one_workers_streams_and_comes_back(home: Home) -> None:
    home.start()
    streams = [home.tokens(250) for _ in range(4)]
    for stream in streams:
        next(stream)
    holders = Counter(int(row["holder"].split("-")[1]) for row in home.get("/v1/pools/smol/leases")[1])
    ((number, hit),) = holders.most_common(1)
    killed = next(pid for pid in workers(home) if f'"number":{number},' in Path(f"/proc/{pid}/cmdline").read_text())
    os.kill(killed, signal.SIGKILL)
    wait_until(lambda: home.status("smol")["active_leases"] <= 4 - hit, "the slots of the killed one to be free", 15)
    assert sum(_is_whole(stream) for stream in streams) == 4 - hit, "the others' streams go on"
    wait_until(lambda: len(workers(home)) == 3 and killed not in workers(home), "another one", 15)
    (told,) = home.lines("worker_ended")
    assert "was ended by signal 9" in told["human"]
    for _ in range(12):
        assert home.ask("POST", "/v1/completions", ONE_TOKEN)[0] == 200
    assert home.lines("gateway_ended") == []


def _is_whole(stream: Iterator[bytes]) -> bool:
    try:
        return list(stream)[-1] == b"[DONE]"
    except OSError:
        return False


def test_all_end_with_the_one_that_began_them_and_with_the_daemon(home: Home) -> None:
    home.start()
    stream = home.tokens(2000)
    next(stream)
    first, gateway = workers(home), home.gateway_pid()
    os.kill(gateway, signal.SIGKILL)
    assert not _is_whole(stream)
    wait_until(lambda: not any(map(alive, first)), "its workers to end", 5)
    wait_until(lambda: home.gateway_pid() != gateway and home.follows(), "another one", 15)
    wait_until(lambda: home.status("smol")["active_leases"] == 0, "its lease to be over", 5)
    second = [home.gateway_pid(), *workers(home)]
    assert home.terminate() == 0
    assert not any(map(alive, second))


def test_a_second_gateway_does_not_take_half_of_the_clients(home: Home) -> None:
    home.start()
    words = ("-m", "pool_managerd.cli", "gateway", "--config", str(home.config), "--bind", f"127.0.0.1:{home.gateway_port}")
    for more in ((), ("--workers", "1")):
        found = subprocess.run([sys.executable, *words, *more], capture_output=True, text=True, timeout=60, check=False)
        assert found.returncode == 1 and "another program has this port" in found.stderr, found.stderr


def test_a_pools_limit_holds_over_all_workers_and_each_knows_what_was_said_to_another(open_dir: Path, smol_model: Path) -> None:
    home = Home(open_dir / "home", smol_model, gateway=", workers: 3, capture_bytes: 9MiB", slots=1, requests={"concurrency": 3})
    try:
        home.start()
        with ThreadPoolExecutor(12) as pool:
            codes = list(pool.map(lambda _: home.ask("POST", "/v1/completions", ONE_TOKEN)[0], range(12)))
        assert sorted(codes) == [200] * 3 + [429] * 9, "all of them came while it was loading"
        assert home.ask("POST", "/v1/completions", ONE_TOKEN)[0] == 200, "none is left counted"
        served = [row["request_id"] for row in home.ask("GET", "/v1/requests")[1] if row["status"] == 200]
        for request_id in served * 4:
            status, row = home.ask("GET", f"/v1/requests/{request_id}")
            assert status == 200 and json.loads(row["captured"]["request"]["text"]) == ONE_TOKEN
        assert len(home.lines("captures")) == 3 and home.ask("GET", "/v1/requests/nobody")[0] == 404
    finally:
        home.end()


def test_what_a_key_may_do_at_once_is_counted_over_all_workers(open_dir: Path, smol_model: Path) -> None:
    home = Home(open_dir / "home", smol_model, gateway=", workers: 3, keys_file: keys.json", slots=8)
    key = KeyFile(home.folder / "keys.json").add("laptop", concurrency=2)
    try:
        home.start()
        long: Any = {"model": "smol", "prompt": "a", "max_tokens": 60, "ignore_eos": True}
        assert home.ask("POST", "/v1/completions", ONE_TOKEN, key)[0] == 200
        with ThreadPoolExecutor(16) as pool:
            codes = list(pool.map(lambda _: home.ask("POST", "/v1/completions", long, key)[0], range(16)))
        assert set(codes) == {200, 429} and codes.count(200) >= 2
        rows = home.ask("GET", "/v1/requests", key=key)[1]
        spans = [(row["began_at_ms"], row["began_at_ms"] + row["duration_ms"]) for row in rows if row["status"] == 200]
        # What a request is given is counted a moment after it came.
        most = max(sum(began <= at < until - 30 for began, until in spans) for at, _ in spans)
        assert most <= 2, json.dumps(rows)
        assert home.ask("POST", "/v1/completions", ONE_TOKEN, key)[0] == 200, "none is left counted"
    finally:
        home.end()
