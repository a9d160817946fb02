"""What is purged is the pool's, whatever an engine has put in its place."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from pool_managerd.core.narration import size
from pool_managerd.core.purge import CACHE, WORK
from pool_managerd.errors import NodeError, SpecError
from pool_managerd.runtime.files import RuntimeFiles
from pool_managerd.runtime.pool_places import PoolPlaces

BOTH = (WORK, CACHE)
unlink = os.unlink


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A runtime directory with something in it for pools a and b; beside it is what nobody may touch."""
    files = RuntimeFiles(tmp_path / "run")
    files.prepare()
    for pool_id in ("a", "b"):
        for made in (files.workdir, files.cachedir):
            path = made(pool_id, os.getuid(), os.getgid())
            (path / "deep" / "er").mkdir(parents=True)
            (path / "deep" / "er" / "file").write_bytes(b"x" * 100_000)
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/kept").write_bytes(b"y" * 50_000)
    return files.root


def purged(root: Path, places: tuple[str, ...] = BOTH, pool_id: str = "a") -> dict[str, int]:
    """By directory, what was freed; as much as was said before."""
    found = PoolPlaces(root)
    said = found.measured(pool_id, places)
    freed = found.remove(found.put_away(pool_id, places))
    assert freed == said
    return {one.path: one.bytes for one in freed}


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def kept(root: Path) -> bytes:
    return (root.parent / "outside/kept").read_bytes()


def test_what_is_the_pools_goes_and_what_it_took_is_told(root: Path) -> None:
    took = (root / "work/a/deep/er/file").stat().st_blocks * 512
    assert purged(root) == {str(root / "work/a"): took, str(root / "cache/a"): took} and took >= 100_000
    assert names(root / "work") == names(root / "cache") == ["b"]
    assert (root / "cache/b/deep/er/file").exists(), "another pool's stays"
    assert purged(root) == {}, "again there is nothing"


def test_a_pool_that_keeps_its_cache_keeps_its_user(root: Path) -> None:
    before = (root / "work/a").stat()
    purged(root, (WORK,))
    after = (root / "work/a").stat()
    assert names(root / "work/a") == [] and (root / "cache/a/deep/er/file").exists()
    assert (after.st_uid, after.st_gid, stat.S_IMODE(after.st_mode)) == (before.st_uid, before.st_gid, 0o700)
    assert names(root / "work") == ["a", "b"]


def test_links_are_not_followed_and_second_names_free_nothing(root: Path) -> None:
    outside = root.parent / "outside"
    (root / "work/a/deep/link").symlink_to(outside)
    (root / "work/a/up").symlink_to("../../../outside/kept")
    os.link(outside / "kept", root / "work/a/second")
    os.mkfifo(root / "work/a/fifo")
    took = (root / "work/a/deep/er/file").stat().st_blocks * 512
    assert purged(root, (WORK,)) == {str(root / "work/a"): took}
    assert kept(root) == b"y" * 50_000


@pytest.mark.parametrize("target", ["../../outside", "/etc", "b", "..", "nowhere"])
def test_a_link_in_place_of_the_pools_own_directory_goes_alone(root: Path, target: str) -> None:
    took = (root / "cache/a/deep/er/file").stat().st_blocks * 512
    (root / "work/a").rename(root / "work/.moved")
    (root / "work/a").symlink_to(target)
    assert purged(root) == {str(root / "work/a"): 0, str(root / "cache/a"): took}
    assert kept(root) and (root / "work/b/deep/er/file").exists() and Path("/etc/passwd").exists()
    assert not os.path.lexists(root / "work/a")


@pytest.mark.parametrize("place", BOTH)
def test_a_link_in_place_of_our_directory_refuses_everything(root: Path, place: str) -> None:
    (root / place).rename(root / "moved")
    (root / "moved/a").mkdir(exist_ok=True)
    (root / place).symlink_to("moved")
    with pytest.raises(NodeError, match="cannot use"):
        PoolPlaces(root).measured("a", BOTH)
    with pytest.raises(NodeError, match="cannot use"):
        PoolPlaces(root).put_away("a", (place,))
    assert (root / "moved/a/deep/er/file").exists()


@pytest.mark.parametrize("name", ["..", ".", "../outside", "a/../b", "", "a\0b", ".a.1.removed", "/etc"])
def test_what_cannot_name_a_pool_names_no_directory(root: Path, name: str) -> None:
    for ask in (PoolPlaces(root).measured, PoolPlaces(root).put_away):
        with pytest.raises(SpecError):
            ask(name, BOTH)
    assert kept(root) and (root / "work/a").exists()


def test_a_directory_that_is_replaced_after_it_was_put_away_is_the_next_launchs(root: Path) -> None:
    places = PoolPlaces(root)
    away = places.put_away("a", BOTH)
    (root / "work/a").mkdir()
    (root / "work/a/new").write_text("new")
    places.remove(away)
    assert (root / "work/a/new").read_text() == "new" and names(root / "cache") == ["b"]


def test_what_a_dead_daemon_has_put_away_the_next_one_sweeps(root: Path) -> None:
    PoolPlaces(root).put_away("a", BOTH)
    RuntimeFiles(root).sweep()
    assert names(root / "work") == names(root / "cache") == ["b"]


def test_no_depth_and_no_closed_directory_hurts(root: Path) -> None:
    fd = os.open(root / "work/a", os.O_RDONLY)
    for _ in range(500):
        os.mkdir("d", dir_fd=fd)
        below = os.open("d", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    os.close(fd)
    (root / "cache/a/deep").chmod(0)
    places = PoolPlaces(root)
    assert places.measured("a", BOTH)
    places.remove(places.put_away("a", BOTH))
    assert names(root / "work") == names(root / "cache") == ["b"]


def test_a_file_below_a_nested_directory_that_cannot_be_deleted_fails_the_purge_and_a_later_one_deletes_it(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    took = (root / "work/a/deep/er/file").stat().st_blocks * 512
    stuck = root / "cache/a/slots/slot-0.kv"
    stuck.parent.mkdir()
    stuck.write_bytes(b"x" * 50_000)
    stays = stuck.stat().st_blocks * 512

    def forbidding(name: str, *, dir_fd: int | None = None) -> None:
        if name == stuck.name:
            raise PermissionError(errno.EPERM, "Operation not permitted")
        unlink(name, dir_fd=dir_fd)

    monkeypatch.setattr(os, "unlink", forbidding)
    places = PoolPlaces(root)
    left = stuck
    for freed in (took * 2, 0):
        with pytest.raises(NodeError) as caught:
            places.remove(places.put_away("a", BOTH))
        (left,) = (root / "cache").rglob(stuck.name)
        assert f"cannot delete all of {root}/cache/" in caught.value.message
        assert f"{left} stays: Operation not permitted" in caught.value.message
        assert f"{size(freed)} freed" in caught.value.message and "purge again" in str(caught.value.hint)
        assert {one.path: one.bytes for one in places.measured("a", BOTH)} == {str(left.parent): stays}
        assert places.measured("a", (WORK,)) == places.measured("b", ()) == []
    assert names(root / "work") == ["b"] and len(names(root / "cache")) == 2
    (root / "cache/a").mkdir()
    monkeypatch.undo()
    assert purged(root) == {str(root / "cache/a"): 0, str(left.parent): stays}, "with what a later launch has made"
    assert names(root / "cache") == ["b"]


@pytest.mark.parametrize("pool_id", ["a.1", "ab", "b"])
def test_what_is_left_of_a_pool_is_no_others(root: Path, pool_id: str) -> None:
    PoolPlaces(root).put_away("a", BOTH)
    assert all(".a." not in one.path for one in PoolPlaces(root).measured(pool_id, BOTH))
    assert len(PoolPlaces(root).measured("a", BOTH)) == 2


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("chattr") is None, reason="only root may make a file immutable")
@pytest.mark.parametrize("what", ["a/slots", "a/slots/slot-0.kv"])
def test_an_immutable_file_or_directory_is_named_and_goes_when_it_may(root: Path, what: str) -> None:
    (root / "cache/a/slots").mkdir()
    (root / "cache/a/slots/slot-0.kv").write_bytes(b"x" * 50_000)
    if subprocess.run(["chattr", "+i", root / "cache" / what], check=False, capture_output=True).returncode:
        pytest.skip("this file system has no immutable files")
    places = PoolPlaces(root)
    try:
        with pytest.raises(NodeError, match="stays: Operation not permitted"):
            places.remove(places.put_away("a", BOTH))
        assert names(root / "work") == ["b"] and sum(one.bytes for one in places.measured("a", BOTH)) >= 50_000
    finally:
        subprocess.run(["chattr", "-R", "-i", root / "cache"], check=True, capture_output=True)
    purged(root)
    assert names(root / "cache") == ["b"]
