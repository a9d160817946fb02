"""One daemon per directory: the second is told who has it, and a dead holder holds nothing."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from pool_managerd.errors import NodeError
from pool_managerd.store.lock import DirectoryLock
from tests.conftest import REPOSITORY

_HOLD = """
import pathlib, signal, sys
from pool_managerd.store.lock import DirectoryLock
DirectoryLock(pathlib.Path(sys.argv[1]), "state directory").acquire()
print("held", flush=True)
signal.pause()
"""


@pytest.fixture
def lock(tmp_path: Path) -> DirectoryLock:
    return DirectoryLock(tmp_path / "state", "state directory")


def test_the_lock_creates_its_directory_and_names_its_holder(lock: DirectoryLock, tmp_path: Path) -> None:
    lock.acquire()
    lock.acquire()
    assert (tmp_path / "state/daemon.lock").read_text() == f"{os.getpid()}\n"
    lock.release()
    lock.release()


def test_a_second_daemon_is_refused_with_the_pid_of_the_first_until_that_is_killed(lock: DirectoryLock, tmp_path: Path) -> None:
    argv = [sys.executable, "-c", _HOLD, str(tmp_path / "state")]
    holder = subprocess.Popen(argv, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(REPOSITORY / "src")})
    try:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        with pytest.raises(NodeError, match=rf"cannot use state directory .*\(pid {holder.pid}\)") as refused:
            lock.acquire()
        assert (refused.value.code, refused.value.details["pid"]) == ("ALREADY_RUNNING", str(holder.pid))
        assert str(holder.pid) in (refused.value.hint or "")
        holder.send_signal(signal.SIGKILL)
        holder.wait(10)
        lock.acquire()
        assert (tmp_path / "state/daemon.lock").read_text() == f"{os.getpid()}\n"
    finally:
        holder.kill()
        holder.wait(10)
        if holder.stdout is not None:
            holder.stdout.close()
        lock.release()


def test_a_link_planted_as_the_lock_file_is_refused_and_not_written_through(lock: DirectoryLock, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "state").mkdir()
    (tmp_path / "state/daemon.lock").symlink_to(victim)
    with pytest.raises(NodeError, match="cannot write to state directory"):
        lock.acquire()
    assert victim.read_text() == "precious"


def test_a_directory_that_cannot_be_made_is_a_clear_refusal(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(NodeError, match="cannot write to runtime directory") as refused:
        DirectoryLock(tmp_path / "file/run", "runtime directory").acquire()
    assert (refused.value.code, refused.value.status) == ("STATE_UNWRITABLE", 507)
    assert "--runtime-dir" in (refused.value.hint or "")


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_directories_and_lock_have_their_modes_whatever_the_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        for name, wanted in (("a/b/state", 0o700), ("c/run", 0o755)):
            lock = DirectoryLock(tmp_path / name, "state directory", wanted)
            repaired = lock.acquire()
            lock.release()
            assert (mode(tmp_path / name), mode(tmp_path / name / "daemon.lock")) == (wanted, 0o600)
            assert repaired == []
    finally:
        os.umask(before)
    assert mode(tmp_path / "a") == mode(tmp_path / "a/b") == 0o755


def test_nobody_else_can_take_the_lock_of_an_older_version(lock: DirectoryLock, tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "state/daemon.lock").write_text("")
    (tmp_path / "state/daemon.lock").chmod(0o644)
    lock.acquire()
    assert mode(tmp_path / "state/daemon.lock") == 0o600
    lock.release()


FILES = ("state.db", "state.db-wal", "state.db.new", "state.generation", "journal.ids", "daemon.lock")


@pytest.mark.parametrize("loose", ["state", *(f"state/{name}" for name in FILES)])
def test_what_is_ours_but_loose_is_closed_and_said(lock: DirectoryLock, tmp_path: Path, loose: str) -> None:
    (tmp_path / "state").mkdir(0o700)
    for name in FILES:
        (tmp_path / "state" / name).write_bytes(b"")
        (tmp_path / "state" / name).chmod(0o600)
    (tmp_path / loose).chmod(0o777)
    repaired = lock.acquire()
    assert mode(tmp_path / loose) & 0o022 == 0
    assert len(repaired) == 1
    assert f"{tmp_path / loose} could be written by other users (mode 0777)" in repaired[0]
    lock.release()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("foreign", ["state", *(f"state/{name}" for name in FILES)])
def test_what_belongs_to_another_user_is_refused_with_the_command_to_type(
    lock: DirectoryLock, tmp_path: Path, foreign: str
) -> None:
    (tmp_path / "state").mkdir(0o700)
    for name in FILES:
        (tmp_path / "state" / name).write_bytes(b"")
    os.chown(tmp_path / foreign, 65534, 65534)
    with pytest.raises(NodeError, match="belongs to uid 65534") as refused:
        lock.acquire()
    assert refused.value.code == "DIRECTORY_NOT_OURS"
    assert f"chown 0 {tmp_path / foreign}" in (refused.value.hint or "")


def test_a_mount_for_everybody_is_closed_but_the_systems_own_are_refused(lock: DirectoryLock, tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "state").chmod(0o1777)
    lock.acquire()
    lock.release()
    assert mode(tmp_path / "state") == 0o1755
    shared = Path("/dev/shm")
    before = mode(shared)
    with pytest.raises(NodeError):
        DirectoryLock(shared, "state directory").acquire()
    assert mode(shared) == before


def test_a_parent_in_which_every_user_can_swap_the_directory_is_told(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    lock = DirectoryLock(tmp_path / "open/state", "state directory")
    repaired = lock.acquire()
    lock.release()
    assert len(repaired) == 1
    assert repaired[0].endswith(f"chmod o-w {tmp_path / 'open'}")


def test_a_lock_whose_file_was_removed_is_held_and_put_back(lock: DirectoryLock, tmp_path: Path) -> None:
    lock.acquire()
    (tmp_path / "state/daemon.lock").unlink()
    other = DirectoryLock(tmp_path / "state", "state directory")
    with pytest.raises(NodeError, match="another pool-managerd"):
        other.acquire()
    assert "was removed while this daemon uses the directory" in str(lock.keep())
    assert lock.keep() is None and (tmp_path / "state/daemon.lock").read_text() == f"{os.getpid()}\n"
    with pytest.raises(NodeError, match=rf"pid {os.getpid()}"):
        other.acquire()
    lock.release()
    other.acquire()
    other.release()


def test_a_lock_that_another_daemon_has_taken_meanwhile_is_told_once(tmp_path: Path) -> None:
    """A directory that others may look into is not locked itself: they could hold that."""
    first, second = (DirectoryLock(tmp_path / "run", "runtime directory", 0o755) for _ in range(2))
    first.acquire()
    (tmp_path / "run/daemon.lock").unlink()
    second.acquire()
    assert "is not this daemon's any more: cannot use runtime directory" in str(first.keep())
    assert first.keep() is None
    second.release()
    assert "it is there again" in str(first.keep())
    first.release()
