"""The OOM killer: what the kernel's log and counters say of an engine that is gone, and one real kill."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from pool_managerd.core.artifacts import PreparedEngine
from pool_managerd.runtime import oom
from pool_managerd.runtime.oom import OomWatch, victim_of
from tests.conftest import wait_until
from tests.runtime.support import Bench, within

V1 = Path("/sys/fs/cgroup/memory")


def _tree(root: Path, engine: str, shim: str, counts: dict[str, int]) -> None:
    for pid, group in (("7", engine), ("self", shim)):
        (root / "proc" / pid).mkdir(parents=True, exist_ok=True)
        (root / "proc" / pid / "cgroup").write_text(f"4:memory:{group}\n0::/\n")
    for group, count in counts.items():
        place = root / "sys/fs/cgroup/memory" / group.lstrip("/")
        place.mkdir(parents=True, exist_ok=True)
        (place / "memory.oom_control").write_text(f"oom_kill_disable 0\nunder_oom 0\noom_kill {count}\n")


def _vmstat(root: Path, count: int) -> None:
    (root / "proc").mkdir(exist_ok=True)
    (root / "proc/vmstat").write_text(f"nr_free_pages 1\noom_kill {count}\n")


def test_kills_in_the_engines_own_group_are_its_own(tmp_path: Path) -> None:
    _tree(tmp_path, "/e", "/d", {"/e": 3, "/d": 9})
    watch = OomWatch(7, root=str(tmp_path), kernel_log="/nothing")
    _tree(tmp_path, "/e", "/d", {"/e": 4, "/d": 20})
    assert watch.kills() == (1, "engine")


def test_kills_in_a_group_that_is_shared_are_told_as_such(tmp_path: Path) -> None:
    _tree(tmp_path, "/d", "/d", {"/d": 9})
    watch = OomWatch(7, root=str(tmp_path), kernel_log="/nothing")
    _tree(tmp_path, "/", "/d", {"/d": 10})  # a dead process is in no group
    assert watch.kills() == (1, "shared")


def test_a_kill_in_a_group_that_it_was_moved_to_since_is_the_machines(tmp_path: Path) -> None:
    _tree(tmp_path, "/d", "/d", {"/d": 9, "/e": 2})
    _vmstat(tmp_path, 5)
    watch = OomWatch(7, root=str(tmp_path), kernel_log="/nothing")
    assert watch.kills() == (0, "shared")
    _tree(tmp_path, "/e", "/d", {"/e": 3})
    _vmstat(tmp_path, 6)
    assert watch.kills() == (1, "host")


def test_without_a_group_the_machine_counts(tmp_path: Path) -> None:
    _tree(tmp_path, "/", "/", {})
    _vmstat(tmp_path, 5)
    watch = OomWatch(7, root=str(tmp_path), kernel_log="/nothing")
    assert watch.kills() == (0, "host")
    _vmstat(tmp_path, 6)
    assert watch.kills() == (1, "host")


def test_v2_counts_in_memory_events(tmp_path: Path) -> None:
    place = tmp_path / "sys/fs/cgroup/e"
    for pid, group in (("7", "/e"), ("self", "/d")):
        (tmp_path / "proc" / pid).mkdir(parents=True)
        (tmp_path / "proc" / pid / "cgroup").write_text(f"0::{group}\n")
    place.mkdir(parents=True)
    (place / "memory.events").write_text("low 0\noom 1\noom_kill 0\n")
    watch = OomWatch(7, root=str(tmp_path), kernel_log="/nothing")
    (place / "memory.events").write_text("low 0\noom 2\noom_kill 2\n")
    assert watch.kills() == (2, "engine")


def test_nothing_to_read_is_not_known(tmp_path: Path) -> None:
    watch = OomWatch(7, root=str(tmp_path), kernel_log="/nothing")
    assert watch.kills() == (None, None)
    assert watch.line_about({7}) is None


def test_only_the_kernels_own_words_name_a_victim() -> None:
    words = "Memory cgroup out of memory: Killed process 77 (llama-server) total-vm:1kB, anon-rss:1kB"
    assert victim_of(f"3,1,2,-;{words}\n SUBSYSTEM=x") == (77, words)
    assert victim_of(f"11,1,2,-;{words}") is None, "a program wrote it there"
    assert victim_of("3,1,2,-;oom_reaper: reaped process 77 (x)") is None
    assert victim_of(words) is None
    assert victim_of("3,1,2,-;Out of memory: Killed process 5 (a)") == (5, "Out of memory: Killed process 5 (a)")


def test_the_line_about_one_of_the_engines_processes_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oom, "_FIRST_PID_NAMESPACE", str(Path("/proc/self/ns/pid").readlink()))
    read, write = os.pipe2(os.O_NONBLOCK)  # one write, one read: as /dev/kmsg gives its records
    watch = OomWatch(7, root=str(tmp_path), kernel_log="/nothing")
    watch._log = read
    os.write(write, b"3,1,2,-;Out of memory: Killed process 8 (worker)\n")
    os.close(write)
    assert watch.line_about({7, 8}) == "Out of memory: Killed process 8 (worker)"
    assert watch.line_about({7, 8}) is None, "there is no more"


@pytest.fixture
def small_group() -> Iterator[Path]:
    """A memory cgroup of 48 MiB, v1."""
    group = V1 / f"pool-managerd-test-{os.getpid()}"
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(48 << 20))
        with suppress(OSError):
            (group / "memory.memsw.limit_in_bytes").write_text(str(48 << 20))
    except OSError as problem:
        pytest.skip(f"no memory cgroup (v1) can be made here: {problem}")
    yield group

    def removed() -> bool:
        with suppress(OSError):
            group.rmdir()
        return not group.exists()

    wait_until(removed, "the group to be empty", 5)


EATER = """
import os, sys
open(sys.argv[1] + "/cgroup.procs", "w").write(str(os.getpid()))
print("in", flush=True)
sys.stdin.read(1)
kept = []
while True:
    kept.append(bytearray(os.urandom(1 << 20)))
"""


def test_a_real_kill_is_counted_and_named(small_group: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-I", "-c", EATER, str(small_group)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as engine:
        assert engine.stdin and engine.stdout
        assert engine.stdout.readline() == b"in\n"
        watch = OomWatch(engine.pid)
        engine.stdin.write(b"x")
        engine.stdin.flush()
        os.waitid(os.P_PID, engine.pid, os.WEXITED | os.WNOWAIT)
        assert watch.kills() == (1, "engine")
        assert engine.wait(10) == -signal.SIGKILL
        if os.access("/dev/kmsg", os.R_OK) and watch._log is not None:
            line = watch.line_about({engine.pid})
            assert line is not None and f"Killed process {engine.pid} " in line


SERVER = """
import subprocess, sys, time
worker = subprocess.Popen([sys.executable, "-I", "-c", sys.argv[1], sys.argv[2]], stdin=subprocess.PIPE)
worker.stdin.write(b"x")
worker.stdin.flush()
worker.wait()
time.sleep(float(sys.argv[3]))
"""


@pytest.mark.skipif(not os.access("/dev/kmsg", os.R_OK) or os.geteuid() != 0, reason="the kernel's log is not ours to read")
async def test_a_worker_that_the_kernel_killed_explains_its_server_that_ends_with_0(small_group: Path, bench: Bench) -> None:
    """As vLLM's API server does, a second or five after its EngineCore."""
    (small_group / "cgroup.procs").chmod(0o666)
    engine = PreparedEngine("p", sys.executable, ("-I", "-c", SERVER, EATER, str(small_group), "2.5"))
    record = await within(30, await bench.launch(engine))
    assert record.code == 0 and "Killed process" in (record.oom_line or "")
