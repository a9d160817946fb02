"""Whatever somebody does to the state's files while the daemon runs, no acknowledged change is lost without a word."""

from __future__ import annotations

import asyncio
import os
import resource
import shutil
import sqlite3
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import pytest

from pool_managerd.core.intent import StoredPool
from pool_managerd.errors import NodeError
from pool_managerd.store.place import StatePlace
from pool_managerd.store.state import StateStore

Told = list[tuple[str | None, str | None]]


@pytest.fixture
def told() -> Told:
    return []


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    place = tmp_path / "state"
    place.mkdir()
    return place


@pytest.fixture
async def store(directory: Path, told: Told) -> AsyncIterator[StateStore]:
    opened = StateStore(directory, check_s=0.05)
    opened.listener = lambda trouble, done: told.append((trouble, done))
    opened.open()
    for name in ("a", "b"):
        await opened.put_pool(StoredPool(name, "up", submitted={"port": 1}))
    yield opened
    await opened.close()


async def reread(directory: Path) -> tuple[set[str], str | None]:
    store = StateStore(directory)
    try:
        return set(store.open()), store.degraded
    finally:
        await store.close()


def remove_file(directory: Path, old: Path) -> None:
    (directory / "state.db").unlink()


def remove_all(directory: Path, old: Path) -> None:
    for path in directory.iterdir():
        path.unlink()


def remove_journal(directory: Path, old: Path) -> None:
    (directory / "state.db-wal").unlink()


def cut_short(directory: Path, old: Path) -> None:
    with (directory / "state.db").open("r+b") as file:
        file.truncate(4_096)


def empty(directory: Path, old: Path) -> None:
    (directory / "state.db").write_bytes(b"")


def empty_journal(directory: Path, old: Path) -> None:
    (directory / "state.db-wal").write_bytes(b"")


def overwrite(directory: Path, old: Path) -> None:
    (directory / "state.db").write_bytes(old.read_bytes())


def put_back(directory: Path, old: Path) -> None:
    (directory / "state.db").rename(directory / "moved.db")
    shutil.copy(old, directory / "state.db")


def put_back_alone(directory: Path, old: Path) -> None:
    for path in directory.glob("state.db*"):
        path.rename(directory / f"moved-{path.name}")
    shutil.copy(old, directory / "state.db")


def put_garbage(directory: Path, old: Path) -> None:
    (directory / "other").write_bytes(b"garbage" * 4_000)
    (directory / "other").replace(directory / "state.db")


def recreate_directory(directory: Path, old: Path) -> None:
    shutil.rmtree(directory)
    directory.mkdir()


def write_with_another_program(directory: Path, old: Path) -> None:
    with closing(sqlite3.connect(directory / "state.db")) as db, db:
        db.execute("DELETE FROM pools")
    db.close()


DONE = [remove_file, remove_all, remove_journal, cut_short, empty, empty_journal, overwrite, put_back, put_back_alone,
        put_garbage, recreate_directory, write_with_another_program]  # fmt: skip


async def older_copy(directory: Path, place: Path) -> Path:
    """A whole file as it was before the last changes."""
    source = sqlite3.connect(directory / "state.db")
    with closing(sqlite3.connect(place)) as copy, copy:
        source.backup(copy)
    copy.close()
    source.close()
    return place


@pytest.mark.parametrize("harm", DONE, ids=lambda harm: harm.__name__)
async def test_a_change_after_the_file_was_harmed_is_acknowledged_only_with_all_before_it(
    store: StateStore, directory: Path, tmp_path: Path, told: Told, harm: Callable[[Path, Path], None]
) -> None:
    old = await older_copy(directory, tmp_path / "old.db")
    await store.put_pool(StoredPool("c", "down", held=True))
    store.note_counters("a", 3, 4)
    await store.put_fact("device", "GPU-1", {"cordoned": True})
    harm(directory, old)
    await store.put_pool(StoredPool("d", "up"))
    assert await reread_copy(directory, tmp_path) == {"a", "b", "c", "d"}, "as a daemon finds it that starts after SIGKILL"
    assert [done for _, done in told if done], "and somebody is told"
    await store.close()
    again = StateStore(directory)
    pools = again.open()
    assert (pools["a"].crash_count, pools["a"].submitted, pools["c"].held) == (3, {"port": 1}, True)
    assert again.facts("device") == {"GPU-1": {"cordoned": True}}
    assert again.degraded is None
    await again.close()


async def reread_copy(directory: Path, tmp_path: Path) -> set[str]:
    place = tmp_path / "killed"
    shutil.copytree(directory, place)
    return (await reread(place))[0]


@pytest.mark.parametrize("harm", DONE, ids=lambda harm: harm.__name__)
async def test_harm_is_noticed_and_mended_without_any_change(
    store: StateStore, directory: Path, tmp_path: Path, told: Told, harm: Callable[[Path, Path], None]
) -> None:
    old = await older_copy(directory, tmp_path / "old.db")
    await store.put_pool(StoredPool("c", "up"))
    harm(directory, old)
    async with asyncio.timeout(10):
        while not any(done for _, done in told):
            await asyncio.sleep(0.01)
    assert await reread_copy(directory, tmp_path) == {"a", "b", "c"}
    assert store.last_error is None


async def test_while_the_directory_is_gone_changes_are_refused_and_nothing_is_forgotten(
    store: StateStore, directory: Path, told: Told
) -> None:
    shutil.rmtree(directory)
    with pytest.raises(NodeError, match="the state directory was removed") as refused:
        await store.put_pool(StoredPool("c", "up"))
    assert refused.value.code == "STATE_UNWRITABLE"
    store.note_counters("a", 7, 7)
    assert store.last_error
    directory.mkdir()
    async with asyncio.timeout(10):
        while store.last_error:
            await asyncio.sleep(0.01)
    await store.close()
    store = StateStore(directory)
    pools = store.open()
    await store.close()
    assert set(pools) == {"a", "b"}
    assert pools["a"].crash_count == 7
    assert told[0][0] is not None and told[-1][0] is None


async def test_an_older_copy_that_was_put_back_while_the_daemon_was_down_is_told(
    store: StateStore, directory: Path, tmp_path: Path
) -> None:
    old = await older_copy(directory, tmp_path / "old.db")
    for name in ("c", "d", "e"):
        await store.put_pool(StoredPool(name, "up"))
    await store.close()
    assert (await reread(directory))[1] is None
    put_back_alone(directory, old)
    pools, degraded = await reread(directory)
    assert pools == {"a", "b"}
    assert degraded and "its last 3 changes are not there" in degraded
    (directory / "state.db").unlink()
    assert "older than what was acknowledged" in ((await reread(directory))[1] or "")


@pytest.mark.parametrize("step", ["before the rename", "after the rename"])
async def test_a_renewal_that_is_cut_short_by_death_loses_nothing(store: StateStore, directory: Path, step: str) -> None:
    store._place.write_fresh(store._contents.copy())
    if step == "after the rename":
        store._place.set_aside("replaced")
    killed = directory.with_name("killed")
    shutil.copytree(directory, killed)
    assert (await reread(killed))[0] == {"a", "b"}


async def test_a_failing_write_is_healed_by_itself_and_verified(store: StateStore, told: Told, directory: Path) -> None:
    """A lock that another program holds stands for every trouble that passes."""
    holder = sqlite3.connect(directory / "state.db", isolation_level=None)
    store._db.execute("PRAGMA busy_timeout=10") if store._db else None
    holder.execute("BEGIN IMMEDIATE")
    with pytest.raises(NodeError):
        await store.put_pool(StoredPool("c", "up"))
    assert store.last_error
    holder.execute("ROLLBACK")
    holder.close()
    async with asyncio.timeout(10):
        while store.last_error:
            await asyncio.sleep(0.01)
    assert [trouble is None for trouble, _ in told] == [False, True]


async def test_a_damaged_count_of_commits_stops_no_write(directory: Path) -> None:
    (directory / "state.generation").write_text("9" * 20)
    store = StateStore(directory)
    store.open()
    await store.put_pool(StoredPool("a", "up"))
    await store.close()
    pools, degraded = await reread(directory)
    assert (pools, degraded, store.last_error) == ({"a"}, None, None)


@contextmanager
def descriptors_left(count: int) -> Iterator[None]:
    """This process may open so many more files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    held: list[int] = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(int(path.name) for path in Path("/proc/self/fd").iterdir()) + 8, hard))
    try:
        with suppress(OSError):
            while True:
                held.append(os.open(os.devnull, os.O_RDONLY))
        for _ in range(count):
            os.close(held.pop())
        yield
    finally:
        for fd in held:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("left", range(4))
async def test_where_no_file_can_be_opened_that_is_what_is_told_and_no_change_of_ours(
    store: StateStore, directory: Path, told: Told, left: int
) -> None:
    with descriptors_left(left):
        with pytest.raises(NodeError, match=r"no more files can be opened \(Too many open files\)$") as refused:
            await store.put_pool(StoredPool("c", "up"))
        assert "LimitNOFILE" in str(refused.value.hint)
        assert store.last_error == "no more files can be opened (Too many open files)"
    async with asyncio.timeout(10):
        while store.last_error:
            await asyncio.sleep(0.01)
    assert told == [("no more files can be opened (Too many open files)", None), (None, None)], "the file is still ours"
    await store.put_pool(StoredPool("d", "up"))
    await store.close()
    assert (await reread(directory))[0] == {"a", "b", "d"}


async def test_what_was_written_and_cannot_be_read_back_is_not_told_as_somebody_elses_change(
    store: StateStore, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StatePlace, "read_back", lambda _: sqlite3.connect("/none/of/this"))
    with pytest.raises(NodeError, match="unable to open database file"):
        await store.put_pool(StoredPool("c", "up"))
    monkeypatch.undo()
    async with asyncio.timeout(10):
        while store.last_error:
            await asyncio.sleep(0.01)
    assert (told[-1][1] or "").startswith("Wrote the state anew from memory, because what was written could not be read back")
