"""A gateway of several processes: what they count together, what they ask each other, and who keeps them running."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import socket
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from pool_managerd.errors import NodeError
from pool_managerd.gateway import known_sessions, tally
from pool_managerd.gateway.budgets import Budgets
from pool_managerd.gateway.common_memory import CommonMemory, shared
from pool_managerd.gateway.known_sessions import KnownSessions
from pool_managerd.gateway.siblings import Siblings, new_name, socket_of
from pool_managerd.gateway.tally import Tally
from pool_managerd.gateway.workers import Worker, Workers, WorkerTimes, read_orders
from pool_managerd.httpd.server import listen_together
from pool_managerd.telemetry.families import together
from pool_managerd.telemetry.gateway_metrics import GatewayMetrics
from tests.runtime.support import eventually


def tallies(of: int) -> list[Tally]:
    """Of workers with one memory, each with its own view of it."""
    fd = shared(tally.SIZE)
    return [Tally(CommonMemory(tally.SIZE, os.dup(fd)), worker) for worker in range(of)]


@given(st.lists(st.tuples(st.integers(0, 2), st.sampled_from("abc"), st.booleans()), max_size=60))
def test_never_more_at_once_than_the_limit_over_all_workers(steps: list[tuple[int, str, bool]]) -> None:
    workers, at_work = tallies(3), dict.fromkeys("abc", 0)
    begun: list[tuple[int, str]] = []
    for worker, name, ends in steps:
        if ends:
            if (worker, name) in begun:
                begun.remove((worker, name))
                workers[worker].end(name)
                at_work[name] -= 1
        elif workers[worker].begin(name, 2):
            begun.append((worker, name))
            at_work[name] += 1
            assert at_work[name] <= 2
        else:
            assert at_work[name] == 2, "it was refused while there was room"


def test_what_a_killed_worker_had_begun_is_over_when_the_next_one_begins() -> None:
    fd = shared(tally.SIZE)
    first, second = (Tally(CommonMemory(tally.SIZE, fd), worker) for worker in range(2))
    assert first.begin("a", 2) and second.begin("a", 2) and not first.begin("a", 2)
    again = Tally(CommonMemory(tally.SIZE, fd), 0)
    assert again.begin("a", 2) and not again.begin("a", 2), "the other one's goes on"


def test_workers_that_count_at_the_same_time_lose_nothing() -> None:
    fd = shared(tally.SIZE)
    Tally(CommonMemory(tally.SIZE, fd)).begin_day(5)
    children = []
    for worker in range(2):
        if (pid := os.fork()) == 0:  # no loop, no threads: a child that only counts
            own = Tally(CommonMemory(tally.SIZE, fd), worker)
            for _ in range(3000):
                own.spend("a", 1)
            os._exit(0)
        children.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in children] == [0, 0]
    assert Tally(CommonMemory(tally.SIZE, fd), 2).tokens("a") == 6000


def test_names_have_room_and_those_that_nothing_is_known_of_make_some_at_midnight() -> None:
    own = Tally()
    own.begin_day(1)
    names = (f"key {number} äöü " + "x" * 40 for number in range(5000))
    with pytest.raises(NodeError, match="one more name"):
        any(own.spend(name, 1) for name in names)  # type: ignore[func-returns-value]
    assert own.begin("key 7 äöü " + "x" * 40, 1)
    assert own.begin_day(2) and not own.begin_day(2)
    assert own.spent() == {} and not own.begin("key 7 äöü " + "x" * 40, 1), "what is at work stays"
    own.spend("another", 3)
    assert own.spent() == {"another": 3}


async def test_a_budget_is_spent_over_all_workers_and_written_by_each(tmp_path: Path) -> None:
    one, other = (Budgets(tmp_path / "used", own) for own in tallies(2))
    one.count("a", 60)
    other.count("a", 50)
    assert one.used("a") == other.used("a") == 110
    other.save()
    assert Budgets(tmp_path / "used").used("a") == 110


def test_a_session_is_known_to_every_worker() -> None:
    fd = shared(known_sessions.SIZE)
    one, other = (KnownSessions(CommonMemory(known_sessions.SIZE, fd)) for _ in range(2))
    session = b"0123456789abcdef"
    assert other.last(session) is None
    one.served(session, "p" * 63)
    assert other.last(session) == "p" * 63 and other.last(b"0123" + bytes(12)) is None, "of that place, and another one"
    other.served(session, "n")
    assert one.last(session) == "n"


async def test_siblings_answer_and_one_that_is_gone_is_left_out() -> None:
    name = new_name()
    group = [Siblings(name, number, 3, socket_of(name, number)) for number in range(3)]

    async def twice(number: int) -> int:
        return 2 * number

    for number, one in enumerate(group[:2]):
        await one.start({"number": lambda number=number: number, "twice": twice, "fails": lambda: dict[str, int]()["x"]})
    group[2].close()
    try:
        assert await group[0].ask("number") == [1]
        assert await group[1].ask("twice", 21) == [42]
        assert await group[0].ask("fails") == [] == await group[0].ask("unheard of")
        assert await Siblings().ask("number") == []
    finally:
        for one in group:
            one.close()


def test_the_series_of_all_workers_are_one_valid_text() -> None:
    texts = []
    for worker in range(2):
        metrics = GatewayMetrics({"worker": str(worker)})
        metrics.answered("p", "/v1/models", 200)
        metrics.of_pool("llamacpp", "p").first.observe(3)
        texts.append(metrics.render())
    families = {family.name: family for family in text_string_to_metric_families(together(texts).decode())}
    counted = [(sample.labels["worker"], sample.value) for sample in families["gateway_requests"].samples]
    assert counted == [("0", 1.0), ("1", 1.0)]
    assert len({len(family.samples) % 2 for family in families.values()}) == 1 and together(texts[:1]) == texts[0]


def test_a_port_of_workers_is_nobody_elses() -> None:
    group = listen_together("127.0.0.1:0", 3)
    try:
        assert len({one.getsockname() for one in group}) == 1
        for number in (1, 2):
            with pytest.raises(NodeError, match="Address already in use"):
                listen_together(f"127.0.0.1:{group[0].getsockname()[1]}", number)
        clients = [socket.create_connection(group[0].getsockname()) for _ in range(10)]
        assert accepted(group[0]) == 10, "nobody serves the others yet"
        for one in group[1:]:
            one.listen(64)
        clients += [socket.create_connection(group[0].getsockname()) for _ in range(30)]
        taken = [accepted(one) for one in group]
        assert sum(taken) == 30 and min(taken) > 0
        for client in clients:
            client.close()
    finally:
        for one in group:
            one.close()


def accepted(listener: socket.socket) -> int:
    """How many have come to it."""
    for number in itertools.count():
        try:
            listener.accept()[0].close()
        except BlockingIOError:
            return number
    raise AssertionError("unreachable")


ECHO = """
import os, signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
from pool_managerd.gateway.workers import Worker, read_orders
one = Worker.from_argument(sys.argv[2])
text = read_orders(0)
with open(f"{sys.argv[1]}/{one.number}", "a") as log:
    log.write(f"{os.getpid()} {one.of} {text}\\n")
signal.sigwait({signal.SIGTERM})
"""


@pytest.fixture
def begun(tmp_path: Path) -> Workers:
    return Workers((sys.executable, "-c", ECHO, str(tmp_path)), "a: ü\n", listen_together("127.0.0.1:0", 2))


def seen(folder: Path, number: int) -> list[list[str]]:
    place = folder / str(number)
    return [line.split(" ", 2) for line in place.read_text().splitlines() if line] if place.exists() else []


async def test_workers_are_told_what_to_do_begun_again_and_ended(begun: Workers, tmp_path: Path) -> None:
    running = asyncio.create_task(begun.run())
    await eventually(lambda: len(seen(tmp_path, 0)) == len(seen(tmp_path, 1)) == 1)
    ((pid, of, text),) = seen(tmp_path, 1)
    assert (of, text) == ("2", "a: ü")
    os.kill(int(pid), signal.SIGKILL)
    await eventually(lambda: len(seen(tmp_path, 1)) == 2)
    assert len(seen(tmp_path, 0)) == 1 and not running.done()
    os.kill(os.getpid(), signal.SIGTERM)
    assert await running == 0
    assert not Path(f"/proc/{seen(tmp_path, 1)[1][0]}").exists()


DEAF = ECHO.replace("signal.sigwait({signal.SIGTERM})", "one.common().beats.beat(one.number)\nsignal.pause()")
DYING = """
import json, os, sys
with open(sys.argv[1] + str(json.loads(sys.argv[2])["number"]), "a") as log:
    log.write("x")
os.kill(os.getpid(), 9)
"""
QUICK = WorkerTimes(silent_s=0.5, begins_s=30.0, ends_s=0.5, ends_again_s=0.1)


async def test_a_worker_that_hangs_is_ended_and_begun_again(tmp_path: Path) -> None:
    found = Workers((sys.executable, "-c", DEAF, str(tmp_path)), "", listen_together("127.0.0.1:0", 1), QUICK)
    running = asyncio.create_task(found.run())
    await eventually(lambda: len(seen(tmp_path, 0)) == 2)
    assert not Path(f"/proc/{seen(tmp_path, 0)[0][0]}").exists()
    os.kill(os.getpid(), signal.SIGTERM)
    assert await running == 0, "one that does not hear that it is to end is killed"


async def test_nobody_waits_at_a_worker_that_is_not_there_for_long(tmp_path: Path) -> None:
    listeners = listen_together("127.0.0.1:0", 2)
    where = listeners[0].getsockname()
    found = Workers((sys.executable, "-c", DYING, f"{tmp_path}/"), "", listeners, QUICK)
    running = asyncio.create_task(found.run())
    begun = [tmp_path / "0", tmp_path / "1"]
    await eventually(lambda: all(one.exists() and len(one.read_text()) > 3 for one in begun))
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(where, timeout=5)
    listeners[1].listen(8)
    with socket.create_connection(where, timeout=5):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    assert await running == 0


async def test_workers_that_cannot_begin_end_the_gateway_with_their_code(tmp_path: Path) -> None:
    found = Workers((sys.executable, "-c", "raise SystemExit(3)"), "", listen_together("127.0.0.1:0", 2))
    async with asyncio.timeout(30):
        assert await found.run() == 3


def test_a_worker_knows_that_whoever_began_it_is_gone() -> None:
    reading, writing = os.pipe()
    os.write(writing, (4).to_bytes(8, "little") + b"ab")
    os.close(writing)
    with pytest.raises(EOFError):
        read_orders(reading)
    os.close(reading)
    one = Worker(1, 2, 3, "n", 4, 5, 6, 7, 8)
    assert Worker.from_argument(one.to_argument()) == one
