"""Trees as an engine may leave them: deep, closed, full of links."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pool_managerd.runtime import procfs, removal
from pool_managerd.runtime.removal import remove_tree


def removed(parent: Path, name: str) -> bool:
    fd = os.open(parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        remove_tree(fd, name)
        return not os.path.lexists(parent / name)
    finally:
        os.close(fd)


def test_a_tree_goes_and_what_its_links_name_stays(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/kept").touch()
    tree = tmp_path / "tree"
    (tree / "a/b").mkdir(parents=True)
    (tree / "a/file").touch()
    (tree / "a/link").symlink_to(tmp_path / "outside")
    (tree / "a/b/up").symlink_to("..")
    os.mkfifo(tree / "fifo")
    (tree / "a").chmod(0o000)
    assert removed(tmp_path, "tree")
    assert [path.name for path in tmp_path.iterdir()] == ["outside"]
    assert (tmp_path / "outside/kept").exists()


def test_no_depth_is_too_deep(tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    fd = os.open(tmp_path / "tree", os.O_RDONLY)
    for _ in range(3000):
        os.mkdir("deeper", dir_fd=fd)
        below = os.open("deeper", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    os.close(fd)
    assert removed(tmp_path, "tree")
    assert list(tmp_path.iterdir()) == []


def test_a_link_or_a_file_in_its_place_goes_alone(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "link").symlink_to("outside")
    (tmp_path / "file").touch()
    assert removed(tmp_path, "link")
    assert removed(tmp_path, "file")
    assert removed(tmp_path, "missing")
    assert [path.name for path in tmp_path.iterdir()] == ["outside"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files away")
def test_shared_memory_of_a_uid_goes_when_nothing_runs_as_it_and_processes_are_asked_only_if_there_is_some(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    seen = procfs.stat(os.getpid())
    assert seen is not None
    monkeypatch.setattr(removal, "SHARED_MEMORY", str(tmp_path))

    def pids() -> list[int]:
        asked.append(1)
        return [1]

    monkeypatch.setattr(procfs, "pids", pids)
    monkeypatch.setattr(procfs, "uids", lambda _: {61_900})
    (tmp_path / "others").touch()
    removal.remove_shared_memory(61_900)
    assert asked == []
    (tmp_path / "psm_1").touch()
    os.chown(tmp_path / "psm_1", 61_900, 61_900)
    removal.remove_shared_memory(61_900)
    assert (tmp_path / "psm_1").exists() and asked == [1]
    monkeypatch.setattr(procfs, "stat", lambda _: seen._replace(state="Z"))
    removal.remove_shared_memory(61_900)  # a zombie holds nothing
    assert [path.name for path in tmp_path.iterdir()] == ["others"]
