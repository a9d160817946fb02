"""A real daemon whose state is taken away, or whose disk fails, under its feet."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import wait_until
from tests.system.daemons import Daemon

# Every write of the state fails while the switch is there: what a dying disk does to fdatasync, pwrite and the like.
_FAILING_LAYER = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static int fails(int fd, const char *what) {
    char link[64], path[4096], told[64] = {0};
    const char *place = getenv("FAIL_SWITCH");
    if (!place) return 0;
    FILE *file = fopen(place, "re");
    if (!file) return 0;
    if (!fgets(told, sizeof told, file)) told[0] = 0;
    fclose(file);
    if (strncmp(told, what, strlen(what))) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    if (!strstr(path, "state.db")) return 0;
    errno = EIO;
    return 1;
}
int fdatasync(int fd) {
    static int (*real)(int);
    if (!real) real = dlsym(RTLD_NEXT, "fdatasync");
    return fails(fd, "sync") ? -1 : real(fd);
}
int fsync(int fd) {
    static int (*real)(int);
    if (!real) real = dlsym(RTLD_NEXT, "fsync");
    return fails(fd, "sync") ? -1 : real(fd);
}
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t at) {
    static ssize_t (*real)(int, const void *, size_t, off64_t);
    if (!real) real = dlsym(RTLD_NEXT, "pwrite64");
    return fails(fd, "write") ? -1 : real(fd, data, size, at);
}
ssize_t pwrite(int fd, const void *data, size_t size, off_t at) { return pwrite64(fd, data, size, at); }
"""


@pytest.fixture
def daemon(open_dir: Path) -> Iterator[Daemon]:
    started = Daemon(open_dir / "d").start()
    yield started
    started.end()


def remove(daemon: Daemon) -> None:
    (daemon.state / "state.db").unlink()


def remove_all(daemon: Daemon) -> None:
    for path in daemon.state.glob("state*"):
        path.unlink()


def truncate(daemon: Daemon) -> None:
    (daemon.state / "state.db").write_bytes(b"")


def older_copy(daemon: Daemon) -> None:
    (daemon.state / "state.db").rename(daemon.folder / "moved.db")
    shutil.copy(daemon.folder / "old" / "state.db", daemon.state / "state.db")


@pytest.mark.parametrize("harm", [remove, remove_all, truncate, older_copy], ids=lambda harm: harm.__name__)
def test_what_is_acknowledged_after_the_state_was_harmed_is_there_after_sigkill_with_all_before_it(
    daemon: Daemon, harm: Callable[[Daemon], None]
) -> None:
    shutil.copytree(daemon.state, daemon.folder / "old")
    for number in range(4):
        assert daemon.post(f"/v1/pools/before-{number}")[0] == 200
    harm(daemon)
    for number in range(4):
        assert daemon.post(f"/v1/pools/after-{number}")[0] == 200
    daemon.kill()
    assert [line for line in daemon.lines("state_renewed") if "from memory" in line["human"]]
    daemon.start()
    found = {pool["pool_id"] for pool in daemon.get("/v1/pools")[1]}
    assert found == {f"{when}-{number}" for when in ("before", "after") for number in range(4)}


def test_with_the_state_directory_gone_changes_are_refused_and_said_so(daemon: Daemon) -> None:
    assert daemon.post("/v1/pools/before")[0] == 200
    shutil.rmtree(daemon.state)
    code, answer = daemon.post("/v1/pools/after")
    assert (code, answer["code"]) == (507, "STATE_UNWRITABLE")
    assert "was removed" in answer["message"]
    assert daemon.get("/health")[1]["status"] == "degraded"
    daemon.state.mkdir(mode=0o700)
    wait_until(lambda: daemon.get("/health")[1]["status"] == "ok", "the state to be written again", 20)
    daemon.kill()
    daemon.start()
    assert [pool["pool_id"] for pool in daemon.get("/v1/pools")[1]] == ["before"]


@pytest.mark.parametrize("what", ["sync", "write"])
def test_a_failing_disk_is_told_until_a_write_succeeded(open_dir: Path, what: str) -> None:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("the failing file layer needs a C compiler")
    source, library, switch = open_dir / "failing.c", open_dir / "failing.so", open_dir / "switch"
    source.write_text(_FAILING_LAYER)
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(source), "-ldl"], check=True)
    daemon = Daemon(open_dir / "d", LD_PRELOAD=str(library), FAIL_SWITCH=str(switch)).start()
    try:
        assert daemon.post("/v1/pools/before")[0] == 200
        assert daemon.get("/health")[1]["status"] == "ok"
        assert "\nstate_degraded 0.0\n" in daemon.get("/metrics")[1]
        switch.write_text(what)
        for name in ("lost", "lost-too"):
            code, answer = daemon.post(f"/v1/pools/{name}")
            assert (code, answer["code"]) == (507, "STATE_UNWRITABLE")
            assert daemon.get(f"/v1/pools/{name}/status")[0] == 404
        wait_until(lambda: daemon.get("/health")[1]["status"] == "degraded", "health to say so", 5)
        assert set(daemon.get("/health")[1]) == {"status", "version"}, "and no more than that"
        assert "\nstate_degraded 1.0\n" in daemon.get("/metrics")[1]
        wait_until(lambda: bool(daemon.lines("state_degraded")), "the log to say so", 5)
        switch.unlink()
        assert daemon.post("/v1/pools/after")[0] == 200
        wait_until(lambda: daemon.get("/health")[1]["status"] == "ok", "health to be well again", 15)
        wait_until(lambda: bool(daemon.lines("state_renewed")), "the log to say so", 5)
        daemon.kill()
        daemon.env = {}
        daemon.start()
        assert {pool["pool_id"] for pool in daemon.get("/v1/pools")[1]} == {"before", "after"}
    finally:
        daemon.end()
