from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from pool_managerd.runtime.logfile import LogFile


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path, os.O_RDONLY)
    yield fd
    os.close(fd)


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The log's clock, to be moved."""
    moment = [100.0]
    monkeypatch.setattr("pool_managerd.runtime.logfile.time.monotonic", lambda: moment[0])
    return moment


def make(folder: int, **limits: int) -> LogFile:
    defaults = {"max_bytes": 1000, "keep": 2, "bytes_per_second": 1 << 30}
    log = LogFile(folder, "log", **{**defaults, **limits})
    log.open()
    return log


def parts(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(path.iterdir())}


def test_a_full_log_moves_on_and_only_so_many_parts_stay(folder: int, tmp_path: Path) -> None:
    log = make(folder)
    for letter in b"abcde":
        log.write(bytes([letter]) * 600)
    log.close()
    assert parts(tmp_path) == {"log": b"e" * 600, "log.1": b"d" * 600, "log.2": b"c" * 600}


def test_with_no_part_kept_a_full_log_starts_over(folder: int, tmp_path: Path) -> None:
    log = make(folder, keep=0)
    log.write(b"a" * 600)
    log.write(b"b" * 600)
    log.close()
    assert parts(tmp_path) == {"log": b"b" * 600}


def test_a_log_that_is_full_from_before_is_moved_on_first(folder: int, tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(b"o" * 999)
    log = make(folder)
    log.write(b"new")
    log.close()
    assert parts(tmp_path) == {
        "log": b"new",
        "log.1": b"o" * 999,
    }


def test_two_writers_of_one_log_keep_it_bounded_together(folder: int, tmp_path: Path) -> None:
    first, second = make(folder), make(folder)
    for _ in range(20):
        first.write(b"1" * 300)
        second.write(b"2" * 300)
    first.close()
    second.close()
    assert max(len(content) for content in parts(tmp_path).values()) <= 1000
    assert sorted(parts(tmp_path)) == ["log", "log.1", "log.2"]


def test_a_log_that_somebody_moved_away_is_made_anew(folder: int, tmp_path: Path) -> None:
    log = make(folder)
    log.write(b"one")
    (tmp_path / "log").rename(tmp_path / "moved")
    log.write(b"two")
    log.close()
    assert parts(tmp_path) == {"log": b"two", "moved": b"one"}


def test_a_link_planted_while_running_is_not_written_through(folder: int, tmp_path: Path) -> None:
    log = make(folder)
    (tmp_path / "precious").write_bytes(b"keep me")
    (tmp_path / "log").unlink()
    (tmp_path / "log").symlink_to(tmp_path / "precious")
    log.write(b"overwritten")
    log.close()
    assert (tmp_path / "precious").read_bytes() == b"keep me"
    assert log.dropped_bytes == len(b"overwritten")


def test_above_the_rate_whole_reads_are_dropped_with_one_marker(folder: int, tmp_path: Path, now: list[float]) -> None:
    log = make(folder, max_bytes=1 << 20, bytes_per_second=1000)
    log.write(b"a" * 900)
    log.write(b"b" * 900)
    log.write(b"c" * 10)
    now[0] += 1.0
    log.write(b"d" * 900)
    log.close()
    marker = b"\n[pool-managerd: 910 bytes of output were dropped here]\n"
    assert parts(tmp_path) == {"log": b"a" * 900 + marker + b"d" * 900}
    assert log.dropped_bytes == 910


def test_what_was_dropped_is_due_when_its_second_is_over_whatever_comes_next(
    folder: int, tmp_path: Path, now: list[float]
) -> None:
    log = make(folder, max_bytes=1 << 20, bytes_per_second=10)
    log.write(b"spam\n")
    assert log.milliseconds_to_look() > 60_000, "nothing was dropped"
    log.write(b"spam\nmore spam\nwaiting for a lock\n")
    assert 0 < log.milliseconds_to_look() <= 1001
    log.look()
    assert parts(tmp_path) == {"log": b"spam\n"}
    now[0] += log.milliseconds_to_look() / 1000
    log.look()
    assert parts(tmp_path)["log"].endswith(b"dropped here]\nmore spam\nwaiting for a lock\n")
    assert log.milliseconds_to_look() > 60_000


def test_a_disk_that_stays_full_is_asked_once_a_second(
    folder: int, tmp_path: Path, now: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    log = make(folder, max_bytes=1 << 20, bytes_per_second=10)
    log.write(b"x" * 11)
    monkeypatch.setattr("pool_managerd.runtime.logfile.os.write", lambda fd, data: 0)
    for _ in range(3):
        now[0] += 1.0
        log.look()
        assert log.milliseconds_to_look() == pytest.approx(1001)
    monkeypatch.undo()
    log.close()
    assert b"11 bytes of output were dropped here" in parts(tmp_path)["log"]


def test_what_was_dropped_last_is_said_at_the_end(folder: int, tmp_path: Path) -> None:
    log = make(folder, bytes_per_second=10)
    log.write(b"x" * 11)
    log.close()
    assert b"11 bytes of output were dropped here" in parts(tmp_path)["log"]


@pytest.mark.usefixtures("as_root")
def test_a_full_disk_costs_the_log_and_nothing_else(tmp_path: Path) -> None:
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", tmp_path], check=False, capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("this machine lets nobody mount a tmpfs")
    try:
        folder = os.open(tmp_path, os.O_RDONLY)
        log = LogFile(folder, "log", max_bytes=1 << 20, keep=1, bytes_per_second=1 << 30)
        log.open()
        log.write(b"x" * 60_000)
        log.write(b"y" * 60_000)
        assert log.dropped_bytes > 50_000
        os.truncate(tmp_path / "log", 0)
        log.write(b"again")
        assert b"again" in (tmp_path / "log").read_bytes()
        log.close()
        os.close(folder)
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_of_what_was_dropped_the_last_lines_stay(folder: int, tmp_path: Path) -> None:
    """An engine that spams and dies says why in its last line."""
    log = make(folder, max_bytes=1 << 20, bytes_per_second=1000)
    for _ in range(200):
        log.write(b"spam spam spam spam\n" * 100)
    log.write(b"CUDA error: out of memory\n")
    log.close()
    written = parts(tmp_path)["log"]
    assert written.endswith(b"spam\nCUDA error: out of memory\n")
    assert b"bytes of output were dropped here]\nspam" in written
    assert len(written) < 10_000
    assert len(written) - written.index(b"here]\n") - 6 + log.dropped_bytes == 200 * 2_000 + 26
