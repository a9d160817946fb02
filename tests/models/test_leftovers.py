"""What a cache has that is no model: how old it is, who may go on with it, and that what somebody has is never deleted."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path

import pytest

from pool_managerd.models.cache import ModelCache
from pool_managerd.models.leftovers import Leftovers, bytes_on_disk
from tests.models.test_catalog import A, made

URL = "https://hub.example/org/repo/resolve/c0/a.gguf"


@pytest.fixture
def cache(tmp_path: Path) -> ModelCache:
    found = ModelCache(tmp_path / "cache")
    found.prepare()
    cache_part(found)
    return found


def cache_part(cache: ModelCache, name: str = "x", url: str = URL) -> Path:
    part = cache.root / f"partial/{name}.part"
    part.write_bytes(b"some of it")
    part.with_suffix(".json").write_text(json.dumps({"url": url}))
    return part


def passed(cache: ModelCache, seconds: float) -> None:
    """So much of the cache's own time."""
    cache.keep_time()
    place = cache.books / "time.json"
    told = json.loads(place.read_text())
    place.write_text(json.dumps(told | {"seconds": told["seconds"] + seconds}))


def test_it_is_as_old_as_it_has_been_seen_unchanged_whatever_its_mtime_says(cache: ModelCache) -> None:
    left = Leftovers(cache)
    os.utime(cache.root / "partial/x.part", (0, 0))
    (found,) = left.look((), keep=True)
    assert (found.path, found.kind, found.size_bytes, found.idle_s) == ("partial/x.part", "download", 10, 0)
    passed(cache, 500)
    assert 500 <= left.look((), keep=True)[0].idle_s < 600
    with (cache.root / "partial/x.part").open("ab") as file:
        file.write(b"more")
    assert left.look((), keep=True)[0].idle_s == 0, "somebody goes on with it"


def test_looking_alone_writes_nothing(cache: ModelCache) -> None:
    before = {path: path.stat().st_mtime_ns for path in cache.root.rglob("*")}
    Leftovers(cache).look((), keep=False)
    assert {path: path.stat().st_mtime_ns for path in cache.root.rglob("*")} == before


def test_a_part_that_is_being_fetched_is_told_so_and_not_deleted(cache: ModelCache) -> None:
    left, lock = Leftovers(cache), cache.root / "partial/x.lock"
    (before,) = left.look((), keep=False)
    with lock.open("w") as holder:
        fcntl.flock(holder, fcntl.LOCK_EX)
        assert [one.users for one in left.look((), keep=False) if one.kind == "download"] == [("it is being fetched",)]
        assert left.remove(before) == 0 and (cache.root / "partial/x.part").exists()
    assert left.remove(before) == 10 and list((cache.root / "partial").iterdir()) == []


def test_a_part_that_a_pool_may_go_on_with_says_so(cache: ModelCache) -> None:
    left = Leftovers(cache)
    assert left.look(["hf:org/other:Q8_0", "file:/x"], keep=False)[0].users == ()
    assert left.look([A], keep=False)[0].users == (f"{A} is wanted, and goes on with it",)
    cache_part(cache, "y", "https://host.example/m.gguf")
    assert left.look(["https://host.example/m.gguf"], keep=False)[1].users


def test_what_is_left_of_an_earlier_commit_of_a_model_that_is_here_is_wanted_by_nobody(cache: ModelCache) -> None:
    cache.register(made(cache, A, "a.gguf"))
    orphan = cache.root / "hf/org/repo/older/a.gguf"
    orphan.parent.mkdir()
    orphan.write_bytes(b"of an earlier commit")
    found = Leftovers(cache).look([A, "hf:org/repo:Q2_K"], keep=False)
    assert {one.path: one.users for one in found}["hf/org/repo/older/a.gguf"] == (
        "hf:org/repo:Q2_K is wanted, and goes on with it",
    )
    assert all(one.users == () for one in Leftovers(cache).look([A], keep=False))


def test_files_that_no_note_names_are_found_and_links_are_not_followed(cache: ModelCache, tmp_path: Path) -> None:
    cache.register(made(cache, A, "a.gguf"))
    orphan = cache.root / "hf/org/repo/older/a.gguf"
    orphan.parent.mkdir()
    orphan.write_bytes(b"of an earlier commit")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/mine.gguf").write_bytes(b"mine")
    (cache.root / "hf/org/link").symlink_to(tmp_path / "elsewhere")
    left = Leftovers(cache)
    found = [one for one in left.look((), keep=False) if one.kind == "file"]
    assert [one.path for one in found] == ["hf/org/repo/older/a.gguf"]
    assert bytes_on_disk(cache) == len("a.gguf") + 20 + 10
    assert left.remove(found[0]) == 20 and not orphan.parent.exists() and (tmp_path / "elsewhere/mine.gguf").exists()


def test_drafts_of_a_crash_are_temporary(cache: ModelCache) -> None:
    (cache.root / "refs/abc.123.new").write_text("{")
    (cache.root / "partial/gone.json").write_text("{}")
    found = {one.path: one.kind for one in Leftovers(cache).look((), keep=False)}
    assert found == {"partial/x.part": "download", "refs/abc.123.new": "temporary", "partial/gone.json": "temporary"}


@pytest.mark.parametrize("text", ["", "[1]", '{"partial/x.part": [1]}', '{"partial/x.part": ["a", "b", "c"]}'])
def test_books_that_cannot_be_read_make_nothing_old(cache: ModelCache, text: str) -> None:
    (cache.books / "leftovers.json").write_text(text)
    passed(cache, 10**7)
    assert Leftovers(cache).look((), keep=True)[0].idle_s == 0
