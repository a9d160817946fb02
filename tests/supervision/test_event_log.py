"""Events outlive the daemon: whoever resumes gets everything since, or is told that something is missing."""

from __future__ import annotations

import asyncio
from pathlib import Path

from pool_managerd.core.event import Event
from pool_managerd.store.journal import Journal
from pool_managerd.supervision.event_log import DROPPED_AT_ONCE, KEPT, EventLog, Subscription


def opened(directory: Path) -> tuple[EventLog, Journal]:
    journal = Journal(directory)
    log = EventLog(lambda: 1, journal=journal)
    log.restore()
    return log, journal


def backlog(subscription: Subscription) -> list[Event]:
    return list(subscription._queue)


def types(subscription: Subscription) -> list[tuple[str, int]]:
    return [(event.type, event.id) for event in backlog(subscription)]


async def test_a_reader_that_resumes_after_a_restart_gets_everything_since(tmp_path: Path) -> None:
    first, journal = opened(tmp_path)
    for number in range(5):
        first.emit("notice", f"Before {number}", pool_id="p", n=number)
    await journal.close()
    second, journal = opened(tmp_path)
    second.emit("notice", "After")
    assert [event.human for event in backlog(second.subscribe(3))] == ["Before 3", "Before 4", "After"]
    assert [event.fields["n"] for event in backlog(second.subscribe(0, "p"))] == [0, 1, 2, 3, 4]
    assert [event.id for event in second.recent("notice", "p")] == [1, 2, 3, 4, 5]
    assert backlog(second.subscribe()) == []
    await journal.close()


async def test_a_reader_that_was_away_for_too_long_is_told_of_the_gap_first(tmp_path: Path) -> None:
    first, journal = opened(tmp_path)
    for _ in range(KEPT + DROPPED_AT_ONCE + 10):
        first.emit("notice", "Again")
    oldest = first.recent("notice")[0].id
    assert backlog(first.subscribe(0))[0].type == "notice"
    assert types(first.subscribe(oldest - 1))[0] == ("notice", oldest)
    await journal.close()
    second, journal = opened(tmp_path)
    gap, oldest_now, *_ = backlog(second.subscribe(5))
    assert (gap.type, gap.fields, oldest_now.id) == ("gap", {"after_id": 5, "oldest_id": oldest}, oldest)
    assert types(second.subscribe(gap.id))[0] == ("notice", oldest)  # who resumes behind the gap is not told of it again
    assert types(second.subscribe(5, "p")) == [("gap", gap.id)]
    await journal.close()


async def test_an_id_that_is_not_known_is_a_gap_too(tmp_path: Path) -> None:
    log, journal = opened(tmp_path)
    assert types(log.subscribe(7)) == [("gap", 0)]
    log.emit("notice", "The first one")
    assert types(log.subscribe(7)) == [("gap", 0), ("notice", 1)]
    assert types(EventLog(lambda: 1).subscribe(7)) == [("gap", 0)]
    await journal.close()


async def test_what_befalls_the_journal_is_an_event(tmp_path: Path) -> None:
    (tmp_path / "journal.db").write_bytes(b"no database" * 100)
    log, journal = opened(tmp_path)
    async with asyncio.timeout(5):
        with log.subscribe() as events:
            event = await anext(events)
    assert (event.type, event.level) == ("notice", "warn") and "was damaged" in event.human
    await journal.close()
