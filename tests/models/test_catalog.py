"""The notes of the cache as a catalog: whole at every moment, changed one after the other, and no clock makes them old."""

from __future__ import annotations

import json
import os
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pool_managerd.errors import NodeError
from pool_managerd.models.cache import ModelCache
from pool_managerd.models.cache_time import CacheTime, Clocks
from pool_managerd.models.entries import CachedFile, Entry
from pool_managerd.models.leftovers import Leftovers, bytes_on_disk
from pool_managerd.models.note_file import write_note
from tests.models.kills import killed_at_each

A, B = "hf:org/repo:Q8_0", "hf:org/repo/b.gguf"


def made(cache: ModelCache, ref: str, *names: str, fetched_at_ms: int = 0) -> Entry:
    """An entry whose files are there."""
    files = []
    for name in names:
        path = cache.root / "hf/org/repo/c0" / name
        cache.make_folder(path.parent)
        if not path.exists():
            path.write_bytes(name.encode())
        info = path.stat()
        files.append(CachedFile(str(path.relative_to(cache.root)), info.st_size, "0" * 64, True, info.st_mtime_ns))
    return Entry(ref, "c0", fetched_at_ms, tuple(files))


@pytest.fixture
def cache(tmp_path: Path) -> ModelCache:
    found = ModelCache(tmp_path / "cache")
    found.prepare()
    return found


def known(cache: ModelCache, ref: str) -> Entry:
    entry = cache.find(ref)
    assert entry is not None
    return entry


def noted(cache: ModelCache, ref: str, **changes: Any) -> None:
    """Have its note say so."""
    cache._write(replace(known(cache, ref), **changes))


# --- killed at any moment ---


def test_a_change_that_is_killed_at_any_moment_has_happened_or_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def again(number: int) -> ModelCache:
        cache = ModelCache(tmp_path / f"{number}")
        cache.prepare()
        cache.register(made(cache, A, "a.gguf"))
        cache.register(made(cache, B, "b.gguf"))
        return cache

    def pinning(number: int) -> partial[bool]:
        return partial(again(number).need, A, used=True, pinned=True)

    for number in killed_at_each(monkeypatch, pinning):
        cache = ModelCache(tmp_path / f"{number}")
        assert [entry.ref for entry in cache.all()] == [B, A] and cache.unreadable() == []
        entry = known(cache, A)
        assert entry.pinned == (entry.last_used_ms is not None), "all of the change, or nothing of it"
        assert cache.need(A, pinned=True) and known(cache, A).pinned
        left = [one for one in Leftovers(cache).look((), keep=False) if one.kind != "temporary"]
        assert left == [] and len(list((cache.root / "refs").glob("*.json"))) == 2


def test_a_deletion_that_is_killed_at_any_moment_leaves_a_model_or_what_the_next_one_finds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def removing(number: int) -> partial[int]:
        cache = ModelCache(tmp_path / f"{number}")
        cache.prepare()
        cache.register(made(cache, A, "a-00001.gguf", "a-00002.gguf"))
        cache.register(made(cache, B, "b.gguf"))
        return partial(cache.remove, A)

    for number in killed_at_each(monkeypatch, removing):
        cache = ModelCache(tmp_path / f"{number}")
        known(cache, B)
        entry = cache.find(A)
        files = sorted(path.name for path in (cache.root / "hf/org/repo/c0").iterdir())
        assert entry is None or files == ["a-00001.gguf", "a-00002.gguf", "b.gguf"], "what is believed is all there"
        assert [one.kind for one in Leftovers(cache).look((), keep=False) if one.kind == "file"] == [], "nothing is forgotten"
        cache.remove(A)
        assert [entry.ref for entry in cache.all()] == [B] and bytes_on_disk(cache) == len("b.gguf")


def test_a_note_is_on_the_disk_before_it_has_its_name_and_its_name_before_anything_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    did: list[str] = []
    for name in ("write", "fsync", "rename"):
        real = getattr(os, name)

        def call(*args: object, real: object = real, name: str = name) -> object:
            did.append(name)
            assert callable(real)
            return real(*args)

        monkeypatch.setattr(os, name, call)
    write_note(tmp_path / "note.json", "text")
    assert did == ["write", "fsync", "rename", "fsync"] and (tmp_path / "note.json").read_text() == "text"


def test_a_note_is_not_written_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    (tmp_path / f"note.{os.getpid()}.new").symlink_to(tmp_path / "mine")
    with pytest.raises(OSError, match="symbolic link"):
        write_note(tmp_path / "note.json", "text")
    assert (tmp_path / "mine").read_text() == "mine"


# --- what is there ---


def test_what_a_later_version_has_written_is_refused_and_stays_as_it_is(cache: ModelCache) -> None:
    cache.register(made(cache, A, "a.gguf"))
    cache.register(made(cache, B, "b.gguf"))
    note = next(note for note in (cache.root / "refs").glob("*.json") if json.loads(note.read_text())["ref"] == A)
    later = json.dumps({**json.loads(note.read_text()), "schema": 2, "shards": {}})
    note.write_text(later)
    for change in (
        partial(cache.find, A), cache.all, partial(cache.remove, A), partial(cache.remove, B), partial(cache.need, A),
        partial(cache.register, made(cache, A, "a.gguf")), partial(Leftovers(cache).look, (), keep=True),
    ):  # fmt: skip
        with pytest.raises(NodeError, match="a later version has written it") as caught:
            change()
        assert caught.value.code == "CATALOG_TOO_NEW" and not caught.value.retriable
    assert note.read_text() == later and bytes_on_disk(cache) == 12
    known(cache, B)


def test_a_note_of_an_earlier_version_is_read_and_counts_from_now(cache: ModelCache) -> None:
    cache.register(made(cache, A, "a.gguf"))
    (note,) = (cache.root / "refs").glob("*.json")
    early = json.loads(note.read_text())
    for key in ("schema", "lifecycle", "pinned", "last_used_ms", "last_verified_ms", "needed_at"):
        del early[key]
    note.write_text(json.dumps(early))
    assert known(cache, A).needed_at is None
    cache.keep_time()
    assert known(cache, A).needed_at is not None


def test_the_files_of_a_note_that_cannot_be_read_are_neither_lost_nor_deleted(cache: ModelCache) -> None:
    cache.register(made(cache, A, "a.gguf"))
    (note,) = (cache.root / "refs").glob("*.json")
    note.write_text(note.read_text()[:40])
    assert cache.find(A) is None and cache.all() == [] and cache.unreadable() == [note]
    found = {one.kind: one for one in Leftovers(cache).look((), keep=True)}
    assert found["file"].users == ("it may be what a note names that cannot be read",)
    assert "fetch that model again" in found["note"].users[0]
    cache.register(made(cache, A, "a.gguf"))
    known(cache, A)
    assert Leftovers(cache).look((), keep=False) == []


@pytest.mark.parametrize(
    "harm",
    [{"needed_at": "x"}, {"needed_at": float("nan")}, {"pinned": 1}, {"ref": None}, {"fetched_at_ms": "0"}],
)
def test_nothing_is_decided_by_a_harmed_note(cache: ModelCache, harm: dict[str, Any]) -> None:
    cache.register(made(cache, A, "a.gguf"))
    (note,) = (cache.root / "refs").glob("*.json")
    note.write_text(json.dumps(json.loads(note.read_text()) | harm))
    assert cache.all() == [] and cache.unreadable() == [note]
    cache.keep_time()
    assert cache.remove(A) == 0 and bytes_on_disk(cache) == len("a.gguf")


def test_what_people_have_said_of_a_model_outlives_its_being_fetched_again(cache: ModelCache) -> None:
    cache.register(made(cache, A, "a.gguf"))
    cache.need(A, used=True)
    cache.need(A, pinned=True)
    used = known(cache, A).last_used_ms
    cache.register(made(cache, A, "a.gguf", fetched_at_ms=5))
    entry = known(cache, A)
    assert entry.pinned and entry.last_used_ms == used is not None and entry.fetched_at_ms == 5


def test_what_was_deleted_while_it_was_fetched_is_not_registered(cache: ModelCache) -> None:
    entry = made(cache, A, "a.gguf")
    (cache.root / entry.files[0].path).unlink()
    with pytest.raises(NodeError, match="was changed or deleted meanwhile"):
        cache.register(entry)
    assert cache.all() == []


def test_changes_at_once_lose_nothing_of_each_other(cache: ModelCache) -> None:
    cache.register(made(cache, A, "a.gguf"))
    with ThreadPoolExecutor(8) as pool:
        work: list[Future[Any]] = [pool.submit(cache.need, A, pinned=True)]
        work += [pool.submit(cache.need, A, used=True) for _ in range(20)]
        work += [pool.submit(cache.verified, A, 7) for _ in range(5)]
        for one in work:
            one.result(20)
    entry = known(cache, A)
    assert entry.pinned and entry.last_used_ms and entry.last_verified_ms == 7


def test_what_somebody_has_begun_to_need_since_it_was_decided_stays(cache: ModelCache) -> None:
    cache.register(made(cache, A, "a.gguf"))
    seen = known(cache, A).needed_at
    noted(cache, A, needed_at=(seen or 0) + 1)
    assert cache.remove_unneeded(A, seen) is None and cache.find(A) is not None
    seen = known(cache, A).needed_at
    noted(cache, A, pinned=True)
    assert cache.remove_unneeded(A, seen) is None and cache.find(A) is not None
    noted(cache, A, pinned=False)
    assert cache.remove_unneeded(A, seen) == len("a.gguf") and cache.all() == []


def test_what_another_daemon_needs_stays_as_long_as_that_one_lives(cache: ModelCache) -> None:
    cache.register(made(cache, A, "a.gguf"))
    other = ModelCache(cache.root)
    assert other.need(A, used=True) and cache.is_needed_elsewhere(A) and not other.is_needed_elsewhere(A)
    seen = known(cache, A).needed_at
    assert cache.remove_unneeded(A, seen) is None
    cache.keep_time([A])
    assert cache.is_needed_elsewhere(A) and other.is_needed_elsewhere(A), "both need it"
    other.keep_time([])
    assert not cache.is_needed_elsewhere(A) and other.is_needed_elsewhere(A)
    assert other.remove_unneeded(A, seen) is None
    cache.keep_time([])
    assert other.remove_unneeded(A, seen) == len("a.gguf") and not list(cache.books.glob("needed-*"))


# --- its own time ---


def test_no_clock_that_jumps_makes_anything_old(tmp_path: Path) -> None:
    at = {"since_boot": 100.0, "wall": 1_000_000.0}
    boot = ["one"]
    clocks = Clocks(lambda: at["since_boot"], lambda: at["wall"], lambda: boot[0])
    time = CacheTime(tmp_path / "time.json", lambda: 40.0, clocks)
    assert time.now() == time.keep() == 40, "what it was is not known: nothing is older than it was"
    at["wall"] += 10 * 365 * 86_400
    assert time.now() == 40, "within a boot the wall clock says nothing"
    at["since_boot"] += 3600
    assert time.keep() == 3640
    boot[0], at["since_boot"] = "two", 5.0
    at["wall"] += 600
    assert time.now() == 4240, "over a boot it is all there is to go by"
    at["wall"] += 10 * 365 * 86_400
    assert time.now() == 3640 + 86_400, "and is believed for a day at most"
    at["wall"] = 0.0
    assert time.now() == 3640, "it never goes back"
    for harmed in ('{"seconds": "x"}', '{"seconds": NaN, "boot": "two", "since_boot": 1, "wall": 1}', "[]", ""):
        (tmp_path / "time.json").write_text(harmed)
        assert time.now() == 40


def test_the_time_of_a_cache_goes_on_where_its_latest_note_is(cache: ModelCache) -> None:
    cache.register(made(cache, A, "a.gguf"))
    noted(cache, A, needed_at=5000.0)
    (cache.books / "time.json").unlink()
    assert cache.time.now() == 5000


def test_a_model_is_retired_unless_somebody_has_begun_to_need_it(cache: ModelCache) -> None:
    cache.register(made(cache, A, "a.gguf"))
    at = known(cache, A).needed_at or 0.0
    cache.retire(A, at - 1)
    assert known(cache, A).lifecycle == "active"
    cache.retire(A, at)
    assert known(cache, A).lifecycle == "retired"
    cache.need(A, used=True)
    assert known(cache, A).lifecycle == "active"
