"""Family D: the disk is full, read-only, slow to obey, planted or from another time."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.conftest import wait_until
from tests.faults.conftest import Make
from tests.faults.inject import build, leader_of, strace, with_pid
from tests.faults.watched import Watched
from tests.small_disk import fill, mounted_small
from tests.system.daemons import engine
from tests.system.nodes import alive


@pytest.fixture
def disk(open_dir: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A small file system as the state directory; its size and options are the test's."""
    (open_dir / "d").mkdir()
    with mounted_small(open_dir / "d" / "state", getattr(request, "param", "400k")) as place:
        yield place


def pools_of(daemon: Watched) -> set[str]:
    return {pool["pool_id"] for pool in daemon.get("/v1/pools")[1]}


def until_refused(daemon: Watched) -> set[str]:
    """Register pools until one is refused; those that were acknowledged."""
    acknowledged: set[str] = set()
    for number in range(400):
        code, answer = daemon.post(f"/v1/pools/n{number}/preload?wait=false", engine(*["x" * 8000] * 2, "--exit-after", "0"))
        if code != 202:
            assert (code in (503, 507), answer["code"]) == (True, "STATE_UNWRITABLE"), answer
            return acknowledged
        acknowledged.add(f"n{number}")
    pytest.fail("the disk was never full")


def _goes_on(daemon: Watched, pid: int, make_room: Path | None) -> None:
    assert daemon.post("/v1/pools/refused")[0] in (503, 507), "nothing is acknowledged"
    assert daemon.status("before")["ready"] and daemon.status("before")["pid"] == pid
    assert daemon.get("/v1/snapshots")[0] == daemon.get("/metrics")[0] == 200
    if make_room is not None:
        make_room.unlink()


def test_D1_with_a_full_disk_nothing_is_acknowledged_engines_go_on_and_it_heals(disk: Path, make: Make) -> None:
    daemon = make().start()
    pid = daemon.preload("before")["pid"]
    fill(disk / "filler")
    acknowledged = until_refused(daemon)
    wait_until(lambda: daemon.get("/health")[1]["status"] == "degraded", "health to say so", 10)
    _goes_on(daemon, pid, disk / "filler")
    assert daemon.post("/v1/pools/after")[0] == 200
    wait_until(lambda: daemon.get("/health")[1]["status"] == "ok", "health to be well again", 15)
    daemon.kill()
    daemon.start()
    assert pools_of(daemon) == acknowledged | {"before", "after"}
    assert daemon.judge() == []


@pytest.mark.parametrize("disk", ["4m,nr_inodes=20"], indirect=True)
def test_D13_without_inodes_it_is_as_with_a_full_disk(disk: Path, make: Make) -> None:
    daemon = make().start()
    pid = daemon.preload("before")["pid"]
    fillers = []
    for number in range(30):
        try:
            (disk / f"filler-{number}").touch()
            fillers.append(disk / f"filler-{number}")
        except OSError:
            break
    assert len(fillers) < 30, "there are no more"
    assert daemon.post("/v1/pools/after")[0] in (200, 503, 507)
    assert daemon.post("/v1/pools/before/leases")[0] in (201, 507)
    daemon.kill()
    assert alive(pid)
    for filler in fillers:
        filler.unlink()
    daemon.start()
    daemon.until(lambda s: s["ready"], "the engine to be adopted", "before")
    assert daemon.judge() == []


READ_ONLY = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdlib.h>
#include <unistd.h>
static int fails(void) { char *place = getenv("FAIL_SWITCH"); return place && access(place, F_OK) == 0; }
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t at) {
    static ssize_t (*real)(int, const void *, size_t, off64_t);
    if (!real) real = dlsym(RTLD_NEXT, "pwrite64");
    if (fails()) { errno = EROFS; return -1; }
    return real(fd, data, size, at);
}
ssize_t pwrite(int fd, const void *data, size_t size, off_t at) { return pwrite64(fd, data, size, at); }
"""


def test_D3_a_state_directory_that_turns_read_only_stops_changes_and_no_engine(make: Make, open_dir: Path) -> None:
    """While files are open for writing a mount cannot be made read-only: a layer below the daemon says EROFS."""
    switch = open_dir / "switch"
    daemon = make(LD_PRELOAD=str(build(READ_ONLY, open_dir, "readonly")), FAIL_SWITCH=str(switch)).start()
    pid = daemon.preload("before")["pid"]
    switch.touch()
    _goes_on(daemon, pid, switch)
    wait_until(lambda: daemon.post("/v1/pools/after")[0] == 200, "the disk to be used again", 15)
    wait_until(lambda: daemon.get("/health")[1]["status"] == "ok", "health to be well again", 15)
    daemon.kill()
    daemon.env.clear()
    daemon.env["AUTH_TOKEN"] = str(daemon.token)
    daemon.start()
    assert pools_of(daemon) == {"before", "after"}


def test_D3_a_read_only_state_directory_at_the_start_is_a_clear_refusal_that_ends_no_engine(disk: Path, make: Make) -> None:
    daemon = make().start()
    pid = daemon.preload("before")["pid"]
    daemon.kill()
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    try:
        assert daemon.launch().wait(30) == 1
        assert "cannot write to state directory" in daemon.text() and "Traceback" not in daemon.text()
        assert alive(pid), "a daemon that cannot start ends nobody"
    finally:
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
    daemon.start()
    daemon.until(lambda s: s["ready"] and s["pid"] == pid, "the engine to be adopted", "before")
    assert daemon.judge() == []


WRITES = ("pwrite64", "fdatasync", "ftruncate", "unlink", "rename")


def dies_at(make: Make, name: str, syscall: str, when: int) -> bool:
    """Kill the daemon at the ``when``-th such call on its state, while changes are asked for; whether it came to that."""
    daemon = make(name=name)
    files = tuple(daemon.state / f"{db}{part}" for db in ("state.db", "leases.db") for part in ("", "-wal", "-shm", "-journal"))
    wrap = strace(f"{syscall}:signal=SIGKILL:when={when}", files=(*files, daemon.state / "state.generation"))
    process = daemon.launch(wrap=wrap)
    asked = 0
    deadline = time.monotonic() + 20
    while process.poll() is None and asked < 12 and time.monotonic() < deadline:
        try:
            code, _ = daemon.post(f"/v1/pools/n{asked}")
            asked += code == 200
        except ConnectionRefusedError:
            time.sleep(0.02)
        except (OSError, http.client.HTTPException):
            break
    survived = process.poll() is None and asked == 12
    if survived:
        os.kill(leader_of(daemon), signal.SIGKILL)
    process.wait(20)
    daemon.start()
    assert daemon.judge() == [], (syscall, when, asked)
    return not survived


@pytest.mark.parametrize("syscall", ["pwrite64", "fdatasync"])
def test_D5_killed_at_a_write_nothing_that_was_acknowledged_is_lost(make: Make, syscall: str) -> None:
    assert dies_at(make, "d", syscall, 20 if syscall == "pwrite64" else 5)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("syscall", WRITES)
def test_D5_killed_at_every_call_of_a_commit_nothing_that_was_acknowledged_is_lost(make: Make, syscall: str) -> None:
    reached = 0
    for when in [*range(1, 13), *range(14, 60, 3)]:
        if not dies_at(make, f"d{when}", syscall, when):
            break
        reached = when
    assert reached or syscall in ("rename", "unlink", "ftruncate"), "there are such calls"


@pytest.mark.parametrize("syscall", ["fdatasync", "pwrite64"])
def test_D5_an_input_output_error_is_not_acknowledged(make: Make, syscall: str) -> None:
    daemon = make()
    wrap = strace(f"{syscall}:error=EIO:when=30+7", files=(daemon.state / "state.db", daemon.state / "state.db-wal"))
    daemon.start(wrap=wrap)
    codes = [daemon.post(f"/v1/pools/n{number}")[0] for number in range(30)]
    assert set(codes) <= {200, 507}
    leader = leader_of(daemon)
    daemon.watch.expect(False)
    os.kill(leader, signal.SIGKILL)
    assert daemon.process is not None
    daemon.process.wait(20)
    daemon.start()
    assert pools_of(daemon) == {f"n{number}" for number, code in enumerate(codes) if code == 200}


@pytest.mark.parametrize("name", ["state.db", "leases.db", "journal.db"])
def test_D7_what_a_newer_version_wrote_is_refused_untouched(make: Make, name: str) -> None:
    daemon = make().start()
    daemon.post("/v1/pools/p")
    assert daemon.terminate() == 0
    place = daemon.state / name
    with closing(sqlite3.connect(place)) as db, db:
        db.execute(f"PRAGMA user_version={db.execute('PRAGMA user_version').fetchone()[0] + 1}")
    before = place.read_bytes()
    if name == "journal.db":  # nothing that is promised is in it: it is left alone, and the daemon goes on without
        daemon.start()
        assert daemon.terminate() == 0
    else:
        assert daemon.launch().wait(30) == 1
        assert "a newer version wrote it" in daemon.text()
    assert place.read_bytes() == before


def impostor_of(daemon: Watched) -> tuple[subprocess.Popen[bytes], int]:
    """The daemon and its engine are gone, and another program has the engine's pid."""
    pid = daemon.preload("p", slots_total=2)["pid"]
    assert daemon.post("/v1/pools/p/leases")[0] == 201
    daemon.promises["p"].leases.clear()
    (record,) = (daemon.run / "shims").glob("*.json")
    text = record.read_text()
    shim = json.loads(text)["identity"]["shim_pid"]
    daemon.kill()
    for one in (shim, pid):
        os.kill(one, signal.SIGKILL)
        wait_until(lambda: not alive(one), "it to have ended", 10)  # noqa: B023
    wait_until(lambda: not Path(f"/proc/{pid}").exists(), "the pid to be free", 10)
    record.write_text(text)
    return with_pid(pid, ["sleep", "600"]), pid


def test_D11_a_pid_that_another_program_has_now_is_never_signalled(daemon: Watched) -> None:
    impostor, pid = impostor_of(daemon)
    try:
        daemon.start()
        daemon.until(lambda s: s["ready"] and s["pid"] != pid, "an engine of its own")
        assert daemon.status()["active_leases"] == 0
        assert daemon.post("/v1/pools/p/stop?wait=true")[0] == 200
        assert daemon.judge() == [] and impostor.poll() is None, "the other program lives"
    finally:
        impostor.kill()
        impostor.wait(10)


def test_D9_what_another_boot_left_is_dead_and_its_leases_are_void(daemon: Watched) -> None:
    impostor, pid = impostor_of(daemon)
    try:
        (record,) = (daemon.run / "shims").glob("*.json")
        content = json.loads(record.read_text())
        ticks = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
        content["identity"] |= {"boot_id": "0" * 8 + "-0000-4000-8000-" + "0" * 12, "start_ticks": int(ticks)}
        record.write_text(json.dumps(content))
        with closing(sqlite3.connect(daemon.state / "leases.db")) as db, db:
            db.execute("UPDATE boot SET boot_id = 'another'")
        daemon.start()
        daemon.until(lambda s: s["ready"] and s["pid"] != pid, "an engine of its own")
        assert daemon.status()["active_leases"] == 0 and daemon.get("/v1/pools/p/leases") == (200, [])
        assert daemon.judge() == [] and impostor.poll() is None, "no pid of another boot is trusted"
    finally:
        impostor.kill()
        impostor.wait(10)


@pytest.mark.parametrize("place", ["state.db", "leases.db", "journal.db", "daemon.lock", "state.generation"])
def test_D15_a_link_in_the_place_of_a_state_file_is_not_written_through(make: Make, open_dir: Path, place: str) -> None:
    daemon, victim = make(), open_dir / "victim"
    victim.write_text("root:x:0:0\n")
    daemon.state.mkdir(mode=0o700)
    (daemon.state / place).symlink_to(victim)
    process = daemon.launch()
    deadline = time.monotonic() + 20
    while process.poll() is None and not daemon.lines("serving") and time.monotonic() < deadline:
        time.sleep(0.05)
    if process.poll() is None:
        assert daemon.post("/v1/pools/p")[0] in (200, 507)
        assert daemon.terminate() == 0
    else:
        assert process.returncode in (1, 2)
    assert victim.read_text() == "root:x:0:0\n" and "Traceback" not in daemon.text()


@pytest.mark.parametrize(
    "place", ["p.pid", "engine-p.log", "engines/p-r0.json", "engines/engine.json", "work/p", "cache/p", "shims"]
)
def test_D15_a_link_in_the_place_of_a_runtime_file_is_not_written_through(daemon: Watched, open_dir: Path, place: str) -> None:
    victim, folder = open_dir / "victim", open_dir / "victims"
    victim.write_text("root:x:0:0\n")
    folder.mkdir(mode=0o755)
    target = daemon.run / place
    is_folder = place.startswith(("work", "cache", "shims"))
    if target.exists():
        shutil.rmtree(target)
    target.symlink_to(folder if is_folder else victim)
    before = folder.stat()
    code, answer = daemon.post("/v1/pools/p/preload", engine())
    assert code == 200 or answer["message"], answer
    assert victim.read_text() == "root:x:0:0\n" and list(folder.iterdir()) == []
    after = folder.stat()
    assert (after.st_uid, after.st_mode) == (before.st_uid, before.st_mode)
    daemon.post("/v1/pools/p/stop?wait=true")
    if target.is_symlink():
        target.unlink()
    if place == "shims":
        daemon.foreseen.append("a record")


SHORT_WRITES = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdlib.h>
#include <unistd.h>
static int fails(void) { char *place = getenv("FAIL_SWITCH"); return place && access(place, F_OK) == 0; }
int fdatasync(int fd) {
    static int (*real)(int);
    if (!real) real = dlsym(RTLD_NEXT, "fdatasync");
    if (fails()) { errno = EIO; return -1; }
    return real(fd);
}
"""


def test_D_a_disk_that_fails_and_recovers_costs_no_engine(make: Make, open_dir: Path) -> None:
    switch = open_dir / "switch"
    daemon = make(LD_PRELOAD=str(build(SHORT_WRITES, open_dir, "short")), FAIL_SWITCH=str(switch)).start()
    pid = daemon.preload("before")["pid"]
    switch.touch()
    assert daemon.post("/v1/pools/lost")[0] == 507
    os.kill(pid, signal.SIGKILL)
    daemon.until(lambda s: s["pid"] != pid and s["ready"], "a restart, for which no new promise is needed", "before", 20)
    switch.unlink()
    wait_until(lambda: daemon.post("/v1/pools/after")[0] == 200, "the disk to be used again", 15)
    assert pools_of(daemon) == {"before", "after"}
