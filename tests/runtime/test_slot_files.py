"""Saved slots on disk: whose they are, what is no file of theirs, and how one becomes whole."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import cast

import pytest

from pool_managerd.core.slot_cache import SlotFile
from pool_managerd.errors import NodeError
from pool_managerd.runtime.files import RuntimeFiles
from pool_managerd.runtime.launcher import Launcher, LaunchOptions
from pool_managerd.runtime.slot_files import SlotFiles
from pool_managerd.runtime.spawner import Spawner
from tests.runtime.support import eventually

UID, GID = os.geteuid(), os.getegid()


@pytest.fixture
def made(tmp_path: Path) -> tuple[SlotFiles, Path]:
    files = RuntimeFiles(tmp_path / "run")
    files.prepare()
    files.cachedir("p", UID, GID)
    slots = SlotFiles(files.root)
    slots.make("p", UID, GID)
    return slots, files.root / "cache/p/slots"


def test_a_directory_is_its_engines_alone_and_is_kept_when_it_is(made: tuple[SlotFiles, Path]) -> None:
    slots, path = made
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    (path / "x").write_bytes(b"12")
    slots.make("p", UID, GID)
    assert [(file.name, file.size_bytes) for file in slots.all()] == [("x", 2)]


def test_what_has_its_place_is_not_followed(made: tuple[SlotFiles, Path], tmp_path: Path) -> None:
    slots, path = made
    path.rmdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/theirs").write_bytes(b"x")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(NodeError):
        slots.of("p")
    slots.make("p", UID, GID)
    assert not path.is_symlink() and slots.of("p") == [] and (tmp_path / "elsewhere/theirs").exists()


def test_a_file_is_whole_when_it_has_its_name_and_is_closed_to_others(made: tuple[SlotFiles, Path]) -> None:
    slots, path = made
    (path / "saving").write_bytes(b"1234")
    (path / "saving").chmod(0o644)
    slots.complete("p", "saving", "slot", 4)
    assert [file.name for file in slots.of("p")] == ["slot"]
    assert stat.S_IMODE((path / "slot").stat().st_mode) == 0o600
    assert slots.head("p", "slot", 2) == b"12"


def test_one_of_another_length_or_no_file_of_the_engines_own_is_not_kept(made: tuple[SlotFiles, Path], tmp_path: Path) -> None:
    slots, path = made
    (path / "short").write_bytes(b"123")
    outside = tmp_path / "outside"
    outside.write_bytes(b"1234")
    outside.chmod(0o644)
    (path / "link").symlink_to(outside)
    (path / "hard").hardlink_to(outside)
    os.mkfifo(path / "pipe")
    for name in ("short", "link", "hard", "pipe", "missing"):
        with pytest.raises(NodeError, match="cannot keep"):
            slots.complete("p", name, "slot", 4)
    assert not (path / "slot").exists()
    assert stat.S_IMODE(outside.stat().st_mode) == 0o644


def test_removing_takes_whatever_has_the_name_and_nothing_it_points_to(made: tuple[SlotFiles, Path], tmp_path: Path) -> None:
    slots, path = made
    (tmp_path / "outside").write_bytes(b"x")
    (path / "link").symlink_to(tmp_path / "outside")
    (path / "folder").mkdir()
    (path / "folder/deep").write_bytes(b"x")
    for file in slots.of("p"):
        slots.remove(file)
    slots.remove(SlotFile("p", "missing", 0, 0.0))
    slots.remove(SlotFile("nobody", "x", 0, 0.0))
    assert slots.all() == [] and (tmp_path / "outside").exists()


def forbid(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """As the disk may: what is immutable cannot be deleted by root either."""
    unlink = os.unlink

    def forbidding(name: str, *, dir_fd: int | None = None) -> None:
        if name in names:
            raise PermissionError(errno.EPERM, "Operation not permitted")
        unlink(name, dir_fd=dir_fd)

    monkeypatch.setattr(os, "unlink", forbidding)


def test_what_stays_is_named_when_all_else_is_gone(made: tuple[SlotFiles, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    slots, path = made
    (path / "folder").mkdir()
    (path / "folder/other").write_bytes(b"x")
    for stuck in (path / "folder/stuck", path / os.fsdecode(b"\xff")):
        stuck.write_bytes(b"x")
    forbid(monkeypatch, "stuck", os.fsdecode(b"\xff"))
    told = []
    for file in slots.of("p"):
        with pytest.raises(NodeError) as caught:
            slots.remove(file)
        told.append(caught.value.message)
    assert f"cannot remove {path}/folder/stuck: Operation not permitted" in told
    assert rf"cannot remove {path}/\xff: Operation not permitted" in told
    assert not (path / "folder/other").exists()


async def test_what_a_sweep_cannot_delete_is_told_once(made: tuple[SlotFiles, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    _, path = made
    (path / "slot").write_bytes(b"x")
    (path / "stuck").write_bytes(b"x")
    forbid(monkeypatch, "stuck")
    told: list[str] = []
    launcher = Launcher(cast("Spawner", None), RuntimeFiles(path.parents[2]), LaunchOptions(profile="dev"), told.append)
    await launcher.forget("p")
    await launcher.forget_others(())
    await eventually(lambda: bool(told))
    (left,) = (path.parents[1]).rglob("stuck")
    assert told == [f"cannot delete {left}: Operation not permitted"] and not list(path.parents[1].rglob("slot"))


def test_they_go_with_the_pool(made: tuple[SlotFiles, Path]) -> None:
    slots, path = made
    (path / "slot").write_bytes(b"x")
    files = RuntimeFiles(path.parents[2])
    files.forget_pool("p")
    files.sweep()
    assert slots.all() == [] and not path.exists()


def test_a_name_that_is_no_pools_is_refused(made: tuple[SlotFiles, Path]) -> None:
    with pytest.raises(NodeError):
        made[0].of("../p")
    assert made[0].free_bytes() > 0
