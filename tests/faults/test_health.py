"""Family C: what engines answer when they are asked how they are."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time

import pytest

from tests.conftest import free_port, wait_until
from tests.faults.conftest import Make
from tests.faults.inject import leader_of, no_more_files, of_its_own
from tests.faults.oracle import resources_of
from tests.faults.watched import Watched
from tests.system.daemons import engine

HASTY = {"POOL_MANAGERD__HEALTH__STARTUP_TIMEOUT_MS": "1500", "POOL_MANAGERD__HEALTH__STARTUP_CAP_MS": "3000"}
SAYS = "fake_engine.FakeEngine._answer_health = lambda self, connection: connection.sendall({answer!r})"
HTML = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 20\r\n\r\n<html>welcome</html>"
BOMB = """
import gzip
bomb = gzip.compress(bytes(200 << 20), 1)[: 60 << 10]
head = b"HTTP/1.1 200 OK\\r\\nContent-Encoding: gzip\\r\\nContent-Length: %d\\r\\n\\r\\n" % len(bomb)
fake_engine.FakeEngine._answer_health = lambda self, connection: connection.sendall(head + bomb)
"""
SHORT = b'HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{"status": "ok"}'


def never_ready(make: Make, body: dict[str, object], *words: str) -> Watched:
    """Its start fails in time, with a reason that has these words."""
    daemon = make(**HASTY).start()
    began = time.monotonic()
    code, answer = daemon.post("/v1/pools/p/preload", body)
    assert code == 500 and time.monotonic() - began < 10, answer
    status = daemon.status()
    assert not status["ready"] and not status["live"], status
    assert any(word in answer["message"] for word in words) and any(word in str(status["last_error"]) for word in words), answer
    return daemon


@pytest.mark.parametrize(("mode", "word"), [("hang", "no answer within"), ("drip", "no answer within")])
def test_C1_an_engine_that_never_finishes_its_answer_is_given_up_in_time(make: Make, mode: str, word: str) -> None:
    never_ready(make, engine("--health", mode), word)


@pytest.mark.parametrize(
    ("body", "word"),
    [
        (of_its_own(SAYS.format(answer=HTML)), "web page"),
        (engine("--health", "garbage"), "not HTTP"),
        (engine("--health", "redirect"), "302"),
        (of_its_own(SAYS.format(answer=SHORT)), "no answer within"),
    ],
    ids=["html", "garbage", "redirect", "short"],
)
def test_C3_an_answer_that_is_none_is_not_ready_and_the_reason_is_kept(make: Make, body: dict[str, object], word: str) -> None:
    never_ready(make, body, word, word.lower(), "cut off", "not HTTP")


def test_C3_the_right_answer_of_the_wrong_program_is_not_ready(make: Make) -> None:
    port = free_port()
    with socket.socket() as stranger:
        stranger.bind(("127.0.0.1", port))
        stranger.listen()
        threading.Thread(target=_welcome_all, args=(stranger,), daemon=True).start()
        silent = of_its_own("fake_engine.FakeEngine._serve = lambda self: time.sleep(600)", port=port)
        never_ready(make, silent, "another program", "is not held by this engine")


def _welcome_all(listener: socket.socket) -> None:
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        with connection:
            connection.recv(4096)
            connection.sendall(b'HTTP/1.1 200 OK\r\nContent-Length: 15\r\n\r\n{"status":"ok"}')


@pytest.mark.parametrize("kind", ["a gigabyte", "a bomb"])
def test_C5_a_body_without_end_is_cut_off_and_no_bomb_is_unpacked(make: Make, kind: str) -> None:
    daemon = make(**HASTY).start()
    before = resources_of(leader_of(daemon))["rss_bytes"]
    body = engine("--health", "big") if kind == "a gigabyte" else of_its_own(BOMB)
    code, _ = daemon.post("/v1/pools/p/preload", body)
    assert resources_of(leader_of(daemon))["rss_bytes"] - before < 30 << 20
    assert code == 500 and not daemon.status()["ready"]


FLAPS = """
state = {"asked": 0}
honest = fake_engine.FakeEngine._answer_health
def flap(self, connection):
    state["asked"] += 1
    if time.monotonic() - self._started > 1.5 and state["asked"] % 2:
        fake_engine._reply(connection, 503, {})
    else:
        honest(self, connection)
fake_engine.FakeEngine._answer_health = flap
"""


def test_C7_an_engine_that_answers_every_other_probe_does_not_flap(daemon: Watched) -> None:
    assert daemon.post("/v1/pools/p/preload", of_its_own(FLAPS))[0] == 200
    seen = set()
    until = time.monotonic() + 6  # thirty probes
    while time.monotonic() < until:
        seen.add(daemon.status()["ready"])
        time.sleep(0.05)
    changes = [line for line in daemon.lines() if line["action"] in ("unhealthy", "recovered")]
    assert len(changes) <= 1 and daemon.status()["crash_count"] == 0, (seen, changes)


def test_C9_a_busy_engine_that_misses_its_probes_is_not_ended(daemon: Watched) -> None:
    pid = daemon.preload("p", "--busy-after", "1", "--busy-for", "4", slots_total=2)["pid"]
    lease = daemon.post("/v1/pools/p/leases")[1]["lease_id"]
    daemon.until(lambda s: not s["ready"], "its silence to be noticed")
    assert daemon.status()["activity"]["verdict"] == "busy"
    daemon.until(lambda s: s["ready"], "it to have finished")
    status = daemon.status()
    assert (status["pid"], status["crash_count"]) == (pid, 0)
    assert [row["lease_id"] for row in daemon.get("/v1/pools/p/leases")[1]] == [lease]


def test_C11_refused_and_cut_off_are_told_apart(daemon: Watched) -> None:
    daemon.preload("refuses", "--close-port-after", "0.5")
    cuts = "threading.Timer(0.5, lambda: setattr(fake_engine.FakeEngine, '_answer_health', lambda *_: None)).start()"
    assert daemon.post("/v1/pools/cuts/preload", of_its_own(cuts))[0] == 200
    for pool, words in (("refuses", "refused"), ("cuts", "cut off")):
        daemon.until(lambda s: not s["ready"] and words in str(s["last_error"]), f"{pool} to be unready", pool)  # noqa: B023


def test_C11_a_prober_without_descriptors_holds_nothing_against_the_engine(make: Make) -> None:
    slow = {"POOL_MANAGERD__HEALTH__PROBE_INTERVAL_MS": "400", "POOL_MANAGERD__HEALTH__PROBE_TIMEOUT_MS": "900"}
    daemon = make(**slow).start()
    pid = daemon.preload("p")["pid"]
    with daemon.victim(), no_more_files(leader_of(daemon)):
        time.sleep(2)  # five probes, none of which could be sent
    wait_until(lambda: daemon.get("/health")[0] == 200, "the daemon to have descriptors again", 10)
    assert daemon.lines("unhealthy") == [] and daemon.status()["ready"] and daemon.status()["pid"] == pid


def test_C_an_engine_that_dies_in_the_middle_of_an_answer_has_crashed_and_not_failed_its_probe(daemon: Watched) -> None:
    pid = daemon.preload("p")["pid"]
    with socket.create_connection(("127.0.0.1", int(daemon.status()["url"].rpartition(":")[2]))):
        os.kill(pid, signal.SIGKILL)
    daemon.until(lambda s: s["ready"] and s["pid"] != pid, "the restart")
    assert daemon.get("/v1/pools/p/crashes")[1][-1]["signal"] == "SIGKILL" and daemon.status()["crash_count"] == 1
