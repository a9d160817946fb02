"""One daemon per directory: the second is told who has it, and a dead holder holds nothing."""

from __future__ import annotations

import os
import signal
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
        assert (refused.value.error_code, refused.value.details["pid"]) == ("ALREADY_RUNNING", str(holder.pid))
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
    assert (refused.value.error_code, refused.value.http_status) == ("STATE_UNWRITABLE", 507)
    assert "--runtime-dir" in (refused.value.hint or "")
