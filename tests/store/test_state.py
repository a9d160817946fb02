"""The state file: what is acknowledged is there after any end, and what is not ours is left alone."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from pool_managerd.core.intent import StoredPool
from pool_managerd.errors import NodeError
from pool_managerd.store.contents import Contents
from pool_managerd.store.state import SCHEMA_VERSION, StateStore
from tests.conftest import REPOSITORY
from tests.small_disk import fill, mounted_small

ENGINE = {"binary_path": "/bin/true", "port": 8080, "flags": ["-a", "b c"]}
_WRITER = """
import asyncio, pathlib, sys
from pool_managerd.core.intent import StoredPool
from pool_managerd.store.state import StateStore

async def main():
    store = StateStore(pathlib.Path(sys.argv[1]))
    store.open()
    for number in range(10_000):
        await store.put_pool(StoredPool(f"p{number}", "up", submitted={"port": number}))
        print(number, flush=True)

asyncio.run(main())
"""


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[StateStore]:
    opened = StateStore(tmp_path)
    opened.open()
    yield opened
    await opened.close()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 400 kB."""
    with mounted_small(tmp_path / "small") as place:
        yield place


async def test_what_is_refused_is_not_in_the_file_any_more_when_that_is_told(
    store: StateStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A commit whose sync failed, or that cannot be read back, is there for a daemon that comes right after."""
    await store.put_pool(StoredPool("kept", "up"))
    read_back, failures = store._place.read_back, [OSError(5, "Input/output error")]
    monkeypatch.setattr(store._place, "read_back", lambda: _raise(failures.pop()) if failures else read_back())
    with pytest.raises(NodeError, match="Input/output error"):
        await store.put_pool(StoredPool("refused", "up"))
    copy = tmp_path.with_name("copy")
    shutil.copytree(tmp_path, copy)
    next_one = StateStore(copy)
    assert set(next_one.open()) == {"kept"} and not failures
    await next_one.close()
    assert store.last_error is not None, "until the next write has succeeded"
    await store.put_pool(StoredPool("more", "up"))
    assert store.last_error is None


def _raise(error: OSError) -> int:
    raise error


async def put_many(store: StateStore) -> None:
    """More than SQLite has already reserved space for."""
    for number in range(100):
        await store.put_pool(StoredPool(f"never-{number}", "up", submitted={"flags": ["x" * 8192]}))


async def reread(directory: Path) -> dict[str, StoredPool]:
    store = StateStore(directory)
    try:
        return store.open()
    finally:
        await store.close()


async def test_every_field_of_a_pool_comes_back(store: StateStore, tmp_path: Path) -> None:
    await store.put_pool(StoredPool("a", "up", submitted=ENGINE))
    await store.put_pool(StoredPool("b", "down", held=True))
    store.note_counters("a", crash_count=3, restart_count=2)
    await store.remove_pool("never there")
    await store.close()
    assert await reread(tmp_path) == {
        "a": StoredPool("a", "up", submitted=ENGINE, crash_count=3, restart_count=2),
        "b": StoredPool("b", "down", held=True),
    }


async def test_a_new_intent_keeps_the_counters_and_counters_keep_the_intent(store: StateStore, tmp_path: Path) -> None:
    store.note_counters("a", crash_count=1, restart_count=1)
    await store.put_pool(StoredPool("a", "down", held=True))
    store.note_counters("a", crash_count=2, restart_count=1)
    await store.close()
    assert await reread(tmp_path) == {"a": StoredPool("a", "down", held=True, crash_count=2, restart_count=1)}


async def test_a_failed_submission_is_down_for_the_next_daemon(store: StateStore, tmp_path: Path) -> None:
    await store.put_pool(StoredPool("a", "up", submitted=ENGINE))
    store.note_down("a")
    store.note_down("unknown")
    await store.close()
    assert await reread(tmp_path) == {"a": StoredPool("a", "down", submitted=ENGINE)}


async def test_a_removed_pool_stays_removed_when_its_last_counters_come_late(store: StateStore, tmp_path: Path) -> None:
    await store.put_pool(StoredPool("a", "up", submitted=ENGINE))
    await store.remove_pool("a")
    store.note_counters("a", crash_count=1, restart_count=0)
    await store.close()
    assert (await reread(tmp_path)).get("a", StoredPool("a")).submitted is None


async def test_closing_right_behind_queued_writes_loses_none_and_does_not_hang(tmp_path: Path) -> None:
    for round_ in range(20):
        store = StateStore(tmp_path)
        store.open()
        for _ in range(3):
            store.note_counters(f"p{round_}", crash_count=round_, restart_count=0)
        started = time.monotonic()
        await store.close()
        assert time.monotonic() - started < 5
    assert {p.crash_count for p in (await reread(tmp_path)).values()} == set(range(20))


async def test_writes_that_wait_together_are_committed_together(store: StateStore, tmp_path: Path) -> None:
    await asyncio.gather(*(store.put_pool(StoredPool(f"p{n}", "up")) for n in range(300)))
    await store.close()
    assert len(await reread(tmp_path)) == 300


@pytest.mark.parametrize("after", [1, 7, 40])
async def test_what_was_acknowledged_is_there_after_sigkill(tmp_path: Path, after: int) -> None:
    argv = [sys.executable, "-c", _WRITER, str(tmp_path)]
    writer = subprocess.Popen(argv, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(REPOSITORY / "src")})
    assert writer.stdout is not None
    acknowledged = [int(writer.stdout.readline()) for _ in range(after)]
    writer.send_signal(signal.SIGKILL)
    acknowledged += [int(line) for line in writer.stdout.read().splitlines(keepends=True) if line.endswith(b"\n")]
    writer.wait(10)
    writer.stdout.close()
    found = await reread(tmp_path)
    assert {f"p{number}" for number in acknowledged} <= found.keys()
    assert len(found) <= len(acknowledged) + 1
    assert all(pool.submitted == {"port": int(pool_id[1:])} for pool_id, pool in found.items())


async def test_a_full_disk_is_told_loses_nothing_and_heals(small_disk: Path) -> None:
    store = StateStore(small_disk)
    accused: list[str | None] = []
    store.listener = lambda trouble, done: accused.append(done)
    store.open()
    await store.put_pool(StoredPool("before", "up"))
    filler = small_disk / "filler"
    fill(filler)
    with pytest.raises(NodeError, match="cannot write to state directory") as refused:
        await put_many(store)
    assert (refused.value.status, refused.value.code) == (507, "STATE_UNWRITABLE")
    told = store.last_error
    assert told
    filler.unlink()
    await store.put_pool(StoredPool("after", "up"))
    assert store.last_error is None and not any(accused), "nobody else has touched it"
    assert not (small_disk / "state.db.replaced").exists()
    await store.close()
    found = await reread(small_disk)
    assert {"before", "after"} <= found.keys()
    assert all(pool_id.startswith(("before", "after", "never-")) for pool_id in found)


async def test_a_write_that_is_itself_broken_fails_alone_and_the_next_one_works(store: StateStore, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="not JSON serializable"):
        await asyncio.wait_for(store.put_pool(StoredPool("a", "up", submitted={"flags": object()})), 5)
    await asyncio.wait_for(store.put_pool(StoredPool("b", "up")), 5)
    await store.close()
    assert list(await reread(tmp_path)) == ["b"]


async def test_a_write_after_the_end_is_refused_instead_of_waiting_for_ever(tmp_path: Path) -> None:
    store = StateStore(tmp_path)
    store.open()
    await store.close()
    with pytest.raises(NodeError, match="cannot write"):
        await asyncio.wait_for(store.put_pool(StoredPool("a", "up")), 5)


@pytest.mark.parametrize("crashed", [False, True], ids=["closed well", "its journal still to be read"])
async def test_state_of_a_newer_version_is_refused_and_not_touched(tmp_path: Path, crashed: bool) -> None:
    newer = sqlite3.connect(tmp_path / "state.db", isolation_level=None)
    newer.execute("PRAGMA journal_mode=WAL")
    newer.execute("CREATE TABLE pools (something TEXT, quite TEXT, different TEXT)")
    newer.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    newer.execute(f"PRAGMA user_version={SCHEMA_VERSION + 1}")
    place = tmp_path
    if crashed:
        place = tmp_path / "crashed"
        place.mkdir()
        for name in ("state.db", "state.db-wal"):
            shutil.copy(tmp_path / name, place / name)
    newer.close()
    before = {name: (place / name).read_bytes() for name in ("state.db", "state.db-wal") if (place / name).exists()}
    assert len(before) == (2 if crashed else 1)
    store = StateStore(place)
    with pytest.raises(NodeError, match=f"a newer version wrote it .schema {SCHEMA_VERSION + 1}") as refused:
        store.open()
    assert refused.value.code == "STATE_TOO_NEW" and refused.value.hint
    await store.close()
    assert {name: (place / name).read_bytes() for name in before} == before


@pytest.mark.parametrize(
    "damage", ["not a database", "a header alone", "a page overwritten", "text that is no JSON", "other columns"]
)
async def test_damaged_state_is_set_aside_whole_and_a_new_one_begun(tmp_path: Path, damage: str) -> None:
    store = StateStore(tmp_path)
    store.open()
    for number in range(50):
        await store.put_pool(StoredPool(f"p{number}", "up", submitted={"flags": ["x" * 500]}))
    await store.close()
    place = tmp_path / "state.db"
    raw = bytearray(place.read_bytes())
    if damage == "not a database":
        raw[:100] = b"?" * 100
    elif damage == "a header alone":
        del raw[100:]
    elif damage == "a page overwritten":
        raw[4096:8192] = os.urandom(4096)
    place.write_bytes(raw)
    if damage in ("text that is no JSON", "other columns"):
        with closing(sqlite3.connect(place)) as db, db:
            db.execute(
                "UPDATE pools SET submitted = '{' " if "JSON" in damage else "ALTER TABLE pools RENAME COLUMN held TO hold"
            )
        db.close()
    damaged = place.read_bytes()
    store = StateStore(tmp_path)
    assert store.open() == {}
    assert store.degraded and "set aside" in store.degraded
    await store.put_pool(StoredPool("new", "up"))
    await store.close()
    assert (tmp_path / "state.db.corrupt").read_bytes()[100:] == damaged[100:]
    assert list(await reread(tmp_path)) == ["new"]


async def test_the_second_damage_does_not_overwrite_what_was_kept_of_the_first(tmp_path: Path) -> None:
    for text in (b"first damage" * 100, b"second damage" * 100):
        (tmp_path / "state.db").write_bytes(text)
        await reread(tmp_path)
    kept = {path.read_bytes()[:6] for path in tmp_path.glob("state.db.corrupt*")}
    assert kept == {b"first ", b"second"}


@pytest.mark.parametrize("name", ["state.db", "state.db-wal", "state.db-journal"])
async def test_a_planted_link_is_refused_and_not_written_through(tmp_path: Path, name: str) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    (tmp_path / name).symlink_to(victim)
    store = StateStore(tmp_path)
    with pytest.raises(NodeError, match="symbolic link"):
        store.open()
    await store.close()
    assert victim.read_bytes() == b"precious"


async def test_the_state_is_for_its_owner_alone(store: StateStore, tmp_path: Path) -> None:
    await store.put_pool(StoredPool("a", "up", submitted={"env": {"KEY": "secret"}}))
    assert {path.stat().st_mode & 0o077 for path in tmp_path.glob("state.db*")} == {0}


def test_a_missing_directory_is_a_clear_refusal(tmp_path: Path) -> None:
    with pytest.raises(NodeError, match="cannot write to state directory") as refused:
        StateStore(tmp_path / "missing").open()
    assert refused.value.status == 507 and "--state-dir" in (refused.value.hint or "")


# --- facts, and the schema before there were any ---


async def test_facts_come_back_by_kind_and_none_forgets(store: StateStore, tmp_path: Path) -> None:
    await store.put_fact("device", "GPU-1", {"cordoned": True})
    store.note_fact("device", "GPU-2", {"cordoned": True})
    store.note_fact("footprint", "all", {"rows": [["a", 1]]})
    await store.put_fact("device", "GPU-2", None)
    await store.close()
    again = StateStore(tmp_path)
    again.open()
    assert again.facts("device") == {"GPU-1": {"cordoned": True}} and again.facts("unknown") == {}
    assert again.facts("footprint") == {"all": {"rows": [["a", 1]]}}
    await again.close()


async def test_what_was_noted_can_be_waited_for_and_a_full_disk_ends_the_wait(
    store: StateStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.note_fact("drain", "p", {"deadline": 1.5})
    await store.noted()
    with closing(sqlite3.connect(tmp_path / "state.db")) as db:
        assert db.execute("SELECT key FROM facts WHERE kind = 'drain'").fetchall() == [("p",)]

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Contents, "write", full)
    store.note_fact("drain", "q", {"deadline": 1.5})
    await store.noted()
    assert store.last_error is not None and "No space left" in store.last_error


async def test_a_state_of_the_first_schema_is_taken_over_whole(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "state.db")) as first, first:
        first.execute(
            "CREATE TABLE pools (pool_id TEXT PRIMARY KEY, desired TEXT NOT NULL, held INTEGER NOT NULL DEFAULT 0,"
            " submitted TEXT,"
            " crash_count INTEGER NOT NULL DEFAULT 0, restart_count INTEGER NOT NULL DEFAULT 0) STRICT"
        )
        first.execute("INSERT INTO pools VALUES ('p', 'up', 1, NULL, 3, 4)")
        first.execute("PRAGMA user_version=1")
    first.close()
    store = StateStore(tmp_path)
    assert store.open() == {"p": StoredPool("p", "up", held=True, crash_count=3, restart_count=4)}
    await store.put_fact("device", "GPU-1", {"cordoned": True})
    await store.close()
    with closing(sqlite3.connect(tmp_path / "state.db")) as now, now:
        assert now.execute("PRAGMA user_version").fetchone()[0] == SCHEMA_VERSION == 2
    now.close()
