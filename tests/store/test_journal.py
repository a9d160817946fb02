"""The journal: what was told comes back, no id is given twice, and no damage of it costs the node anything."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest

from pool_managerd.core.event import Event
from pool_managerd.store.journal import ID_BLOCK, Journal
from tests.conftest import REPOSITORY, wait_until
from tests.small_disk import fill, mounted_small

_TELLER = """
import pathlib, sys
from pool_managerd.core.event import Event
from pool_managerd.store.journal import Journal

journal = Journal(pathlib.Path(sys.argv[1]))
journal.open(print)
for number in range(journal.last_id + 1, journal.last_id + 1_000_000):
    journal.put_event(Event(number, 1, "notice", "info", "p", "It happened"))
    journal.put_operation(f"op-{number % 50}", {"number": number})
    print(number, flush=True)
"""


class Told:
    """A journal whose sentences are kept, and what it was told of earlier daemons."""

    def __init__(self, directory: Path) -> None:
        self.sentences: list[str] = []
        self.journal = Journal(directory, retry_s=0.05)
        self.journal.open(lambda human, _level: self.sentences.append(human))
        self.last_id = self.journal.last_id
        self.events = self.journal.recall_events()
        self.operations = self.journal.recall_operations()
        self.crashes = self.journal.recall_crashes()

    def put(self, *ids: int) -> None:
        for number in ids:
            self.journal.put_event(event(number))


def event(number: int) -> Event:
    return Event(number, 1_795_000_000_000 + number, "notice", "info", None, f"Event {number}", {"n": number, "of": ["a", "é"]})


def stored_ids(directory: Path) -> list[int]:
    """As another program reads them while the daemon runs."""
    with closing(sqlite3.connect(directory / "journal.db", timeout=5)) as db, db, suppress(sqlite3.OperationalError):
        return [row[0] for row in db.execute("SELECT id FROM events ORDER BY id")]
    return []  # a new file, not made yet


def written(directory: Path, *ids: int) -> None:
    wait_until(lambda: stored_ids(directory) == list(ids), f"events {ids} to be written", 5)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with mounted_small(tmp_path / "small") as place:
        yield place


async def test_events_and_operations_come_back_and_ids_go_on(tmp_path: Path) -> None:
    first = Told(tmp_path)
    assert (first.last_id, first.events, first.operations) == (0, [], [])
    first.put(1, 2, 3)
    for operation_id, body in (("b", {"n": 1}), ("a", {"n": 2}), ("c", {"n": 3}), ("b", {"n": 4}), ("c", None)):
        first.journal.put_operation(operation_id, body)
    await first.journal.close()
    second = Told(tmp_path)
    assert (second.last_id, second.events, second.operations) == (3, [event(1), event(2), event(3)], [{"n": 4}, {"n": 2}])
    assert second.journal.recall_events() == [] == second.journal.recall_operations()
    await second.journal.close()
    assert {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {"journal.db": 0o600, "journal.ids": 0o600}


def test_a_killed_daemon_loses_no_id_and_leaves_no_hole(tmp_path: Path) -> None:
    told = 0
    for _ in range(3):
        argv, env = [sys.executable, "-c", _TELLER, str(tmp_path)], {"PYTHONPATH": str(REPOSITORY / "src")}
        with subprocess.Popen(argv, stdout=subprocess.PIPE, env=env) as teller:
            assert teller.stdout is not None
            first = int(teller.stdout.readline())
            assert first > told, "an id was given twice"
            told = [int(teller.stdout.readline()) for _ in range(500)][-1]
            teller.send_signal(signal.SIGKILL)
            told = max([told, *map(int, teller.stdout.read().split())])
        here = [number for number in stored_ids(tmp_path) if number >= first]
        assert here == list(range(first, first + len(here))), "the journal has a hole"


async def test_what_is_dropped_is_removed(tmp_path: Path) -> None:
    told = Told(tmp_path)
    told.put(1, 2, 3, 4)
    written(tmp_path, 1, 2, 3, 4)
    told.journal.drop_events(2)
    told.put(5)
    written(tmp_path, 3, 4, 5)
    await told.journal.close()


async def test_older_events_go_where_others_are_missing_behind_them(tmp_path: Path) -> None:
    told = Told(tmp_path)
    told.put(1, 2)
    written(tmp_path, 1, 2)
    told.put(5, 6)
    await told.journal.close()
    assert stored_ids(tmp_path) == [5, 6]


@pytest.mark.parametrize("damage", [b"no database", b""], ids=["other content", "emptied"])
async def test_a_damaged_journal_is_begun_anew_and_its_ids_are_not_given_again(tmp_path: Path, damage: bytes) -> None:
    first = Told(tmp_path)
    first.put(1, 2, 3)
    await first.journal.close()
    (tmp_path / "journal.db").write_bytes(damage * 100)
    second = Told(tmp_path)
    assert (second.last_id, second.events) == (3, [])
    assert len(second.sentences) == bool(damage) and all("was damaged" in human for human in second.sentences)
    second.put(4)
    written(tmp_path, 4)
    await second.journal.close()
    assert (tmp_path / "journal.db.corrupt").exists() == bool(damage)


async def test_a_journal_that_is_damaged_or_taken_away_while_the_daemon_runs_is_begun_anew(tmp_path: Path) -> None:
    told = Told(tmp_path)
    told.put(1, 2)
    written(tmp_path, 1, 2)
    for part in ("journal.db", "journal.db-wal", "journal.db-shm", "journal.ids"):
        (tmp_path / part).unlink()
    told.put(3)
    wait_until(lambda: (tmp_path / "journal.db").exists() and stored_ids(tmp_path) == [3], "a new file", 5)
    os.truncate(tmp_path / "journal.db", 5000)
    told.put(4)
    await told.journal.close()
    again = Told(tmp_path)
    assert again.last_id == 4 and [e.id for e in again.events] in ([3, 4], [4], [])
    await again.journal.close()


async def test_an_event_that_cannot_be_read_leaves_no_hole(tmp_path: Path) -> None:
    first = Told(tmp_path)
    first.put(1, 2, 3)
    await first.journal.close()
    with closing(sqlite3.connect(tmp_path / "journal.db")) as db, db:
        db.execute("UPDATE events SET fields = 'not json' WHERE id = 2")
    again = Told(tmp_path)
    assert again.events == [event(3)] and again.last_id == 3
    await again.journal.close()


async def test_a_file_that_stays_damaged_is_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pool_managerd.store.journal_tables.SCHEMA", "no SQL at all")
    told = Told(tmp_path)
    told.put(1)
    wait_until(lambda: any("cannot be written" in human for human in told.sentences), "the trouble to be told", 5)
    told.put(2, 3)
    monkeypatch.undo()
    wait_until(lambda: "again" in told.sentences[-1], "it to recover", 5)
    assert len(told.sentences) <= 4
    await told.journal.close()
    assert stored_ids(tmp_path) == [1, 2, 3]


async def test_lost_ids_are_made_up_for_from_the_newest_event(tmp_path: Path) -> None:
    first = Told(tmp_path)
    first.put(1, 2)
    await first.journal.close()
    for content in (b"", b"not a number", b"1"):
        (tmp_path / "journal.ids").write_bytes(content)
        again = Told(tmp_path)
        assert again.last_id >= 2 + ID_BLOCK and [e.id for e in again.events] == [1, 2]
        await again.journal.close()


async def test_a_full_disk_costs_nothing_but_the_disk_and_is_told_once(small_disk: Path) -> None:
    told = Told(small_disk)
    told.put(1)
    written(small_disk, 1)
    fill(small_disk / "filler")
    big = "x" * 15_000
    for number in range(2, 30):
        told.journal.put_event(Event(number, 1, "notice", "info", None, big))
    wait_until(lambda: bool(told.sentences), "the trouble to be told", 5)
    (small_disk / "filler").unlink()
    told.journal.drop_events(25)
    wait_until(lambda: len(told.sentences) == 2, "it to recover", 5)
    assert "cannot be written" in told.sentences[0] and "again" in told.sentences[1]
    await told.journal.close()
    assert stored_ids(small_disk) == [26, 27, 28, 29]


async def test_a_link_is_not_followed_and_a_newer_journal_is_left_alone(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_bytes(b"precious")
    (tmp_path / "links").mkdir()
    for name in ("journal.db", "journal.ids"):
        (tmp_path / "links" / name).symlink_to(target)
    linked = Told(tmp_path / "links")
    linked.put(1)
    await linked.journal.close()
    assert target.read_bytes() == b"precious" and "symbolic link" in linked.sentences[0]
    (tmp_path / "newer").mkdir()
    with closing(sqlite3.connect(tmp_path / "newer/journal.db")) as db, db:
        db.execute("PRAGMA user_version=99")
    newer = Told(tmp_path / "newer")
    newer.put(1)
    await newer.journal.close()
    assert len(newer.sentences) == 1 and "newer version" in newer.sentences[0]
    with closing(sqlite3.connect(tmp_path / "newer/journal.db")) as db, db:
        assert db.execute("SELECT count(*) FROM sqlite_master").fetchone() == (0,)


@pytest.mark.parametrize("harm", ["pipe", "directory", "link", "huge"])
async def test_a_number_that_cannot_be_relied_on_neither_hangs_nor_counts(tmp_path: Path, harm: str) -> None:
    first = Told(tmp_path)
    first.put(1, 2, 3)
    await first.journal.close()
    ids = tmp_path / "journal.ids"
    ids.unlink()
    if harm == "pipe":
        os.mkfifo(ids)
    elif harm == "directory":
        ids.mkdir()
    elif harm == "link":
        ids.symlink_to(tmp_path / "precious")
    else:
        ids.write_text(str(1 << 60))
    again = Told(tmp_path)
    assert 3 < again.journal.last_id < 1 << 20
    told = [human for human in again.sentences if "cannot be reserved" in human]
    assert bool(told) is (harm != "huge") and not (tmp_path / "precious").exists()
    await again.journal.close()


async def test_crash_reports_come_back_in_their_order_as_they_were_last(tmp_path: Path) -> None:
    first = Told(tmp_path)
    for crash_id, body in (("b", {"n": 1}), ("a", {"n": 2}), ("c", {"n": 3}), ("b", {"n": 4}), ("c", None)):
        first.journal.put_crash(crash_id, body)
    first.journal.put_operation("b", {"operation": 1})
    await first.journal.close()
    second = Told(tmp_path)
    assert (second.crashes, second.operations) == ([{"n": 4}, {"n": 2}], [{"operation": 1}])
    second.journal.put_crash("a", None)
    await second.journal.close()
    third = Told(tmp_path)
    assert third.crashes == [{"n": 4}] and third.journal.recall_crashes() == []
    await third.journal.close()


async def test_a_journal_of_version_1_is_taken_up_and_gets_what_it_lacks(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "journal.db")) as db, db:
        db.executescript((Path(__file__).parent / "journal_v1.sql").read_text())
    told = Told(tmp_path)
    assert [(e.id, e.type, e.fields) for e in told.events] == [
        (1, "crash", {"exit_code": 3}),
        (2, "backoff", {"backoff_ms": 1000}),
    ]
    assert (told.operations, told.crashes) == ([{"operation_id": "op-1", "status": "succeeded"}], [])
    told.journal.put_crash("p/r0/1/5", {"n": 1})
    await told.journal.close()
    assert told.sentences == []
    with closing(sqlite3.connect(tmp_path / "journal.db")) as db, db:
        assert db.execute("PRAGMA user_version").fetchone() == (2,)
        assert db.execute("SELECT crash_id, body FROM crashes").fetchall() == [("p/r0/1/5", '{"n":1}')]
        assert db.execute("SELECT count(*) FROM events").fetchone() == (2,)
