"""``events -f`` and ``logs -f`` go on when the daemon comes back: nothing twice, nothing left out."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY, wait_until
from tests.system.daemons import Daemon
from tests.system.nodes import alive, mentioning

LOST = "lost the daemon, waiting for it …\n"


class Following:
    """A command that follows, and what it has said so far."""

    def __init__(self, daemon: Daemon, out: Path, *command: str) -> None:
        self._out, self._err = out.with_suffix(".out"), out.with_suffix(".err")
        env = os.environ | {"PYTHONPATH": str(REPOSITORY / "src")}
        with self._out.open("wb") as stdout, self._err.open("wb") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "pool_managerd.cli", *command, "--config", str(daemon.config)],
                env=env, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, cwd=daemon.folder,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
            )  # fmt: skip

    @property
    def out(self) -> str:
        return self._out.read_text()

    @property
    def err(self) -> str:
        return self._err.read_text()

    def until(self, condition: Callable[[], bool], what: str) -> None:
        wait_until(condition, what, 20)


@contextmanager
def following(daemon: Daemon, out: Path, *command: str) -> Iterator[Following]:
    found = Following(daemon, out, *command)
    try:
        yield found
    finally:
        found.process.kill()
        found.process.wait()


@pytest.fixture
def daemon(open_dir: Path) -> Iterator[Daemon]:
    made = Daemon(open_dir / "d")
    yield made
    made.end()


def test_a_test_that_kills_its_daemon_leaves_no_engine(daemon: Daemon) -> None:
    pid = daemon.start().preload("p")["pid"]
    daemon.kill()
    assert alive(pid)
    daemon.end()
    assert not alive(pid)
    wait_until(lambda: mentioning(daemon.folder) == [], "its shim to end", 10)


def test_events_go_on_behind_the_last_one_that_was_seen_and_ctrl_c_ends_the_wait(daemon: Daemon, tmp_path: Path) -> None:
    daemon.start()
    with following(daemon, tmp_path / "events", "events", "-f", "-o", "json", "--level", "debug") as events:
        daemon.preload("p")
        events.until(lambda: "'p' is ready after" in events.out, "the pool to be ready")
        daemon.kill()
        events.until(lambda: events.err == LOST, "the loss to be told")
        daemon.start()
        daemon.preload("q")
        events.until(lambda: "'q' is ready after" in events.out, "what the next daemon tells")
        daemon.kill()
        events.until(lambda: events.err == LOST * 2, "the second loss to be told")
        events.process.send_signal(signal.SIGINT)
        assert events.process.wait(10) == 130
        ids = [json.loads(line)["id"] for line in events.out.splitlines()]
    assert ids == sorted(set(ids)), "no event twice"
    assert not any('"gap"' in line for line in events.out.splitlines()) and events.err == LOST * 2


def test_a_log_goes_on_where_it_was_with_what_was_written_meanwhile(daemon: Daemon, tmp_path: Path) -> None:
    daemon.start()
    daemon.preload("p")
    log = daemon.run / "engine-p.log"

    def write(text: str) -> int:
        with log.open("a") as file:
            return file.write(text)

    with following(daemon, tmp_path / "log", "logs", "p", "-f", "-n", "0") as lines:
        lines.until(lambda: write("before\n") > 0 and "before" in lines.out, "the log to be followed")
        write("last\n")
        lines.until(lambda: lines.out.endswith("last\n"), "all of it")
        seen = lines.out
        daemon.kill()
        lines.until(lambda: lines.err == LOST, "the loss to be told")
        write("meanwhile\nmeanwhile\n")
        daemon.start()
        lines.until(lambda: "meanwhile" in lines.out, "what was written meanwhile")
        write("after\n")
        lines.until(lambda: lines.out.endswith("after\n"), "what comes after")
        assert lines.out.startswith(seen + "meanwhile\nmeanwhile\n") and lines.out.count("after") == 1
        assert lines.err == LOST and lines.process.poll() is None


def test_what_the_daemon_refuses_and_what_does_not_follow_ends_at_once(daemon: Daemon, tmp_path: Path) -> None:
    daemon.start()
    with following(daemon, tmp_path / "none", "logs", "none", "-f") as refused:
        assert refused.process.wait(10) == 4 and "not found" in refused.err
    daemon.preload("p")
    with following(daemon, tmp_path / "log", "logs", "p", "-f") as lines:
        lines.until(lambda: bool(lines.out), "the log")
        assert daemon.terminate() == 0
        lines.until(lambda: lines.err == LOST, "the loss to be told")
        for name, command in (("read", ("logs", "p")), ("past", ("events",)), ("first", ("logs", "p", "-f"))):
            with following(daemon, tmp_path / name, *command) as read:
                assert read.process.wait(10) == 3 and LOST not in read.err
        shutil.rmtree(daemon.state)
        daemon.start()
        assert lines.process.wait(20) == 4 and "pool p not found" in lines.err
