"""The command on a real terminal: what it draws, what keys and signals do, and that the terminal is as it was in the end."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pool_managerd.errors import RequestError
from tests.cli.test_commands import Server
from tests.cli.top_nodes import Gateway, whole
from tests.conftest import DEADLINE_S

SOURCE = str(Path(__file__).resolve().parents[2] / "src")
LEAVE = b"\x1b[?7h\x1b[?25h\x1b[?1049l"
ENTER = b"\x1b[?1049h"


def _as_a_login() -> None:
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Terminal:
    """A pseudo-terminal with one command on it, in a session of its own."""

    def __init__(self, argv: list[str], columns: int = 80, rows: int = 24, **env: str) -> None:
        self.fd, slave = pty.openpty()
        self.said = b""
        self.resize(columns, rows)
        self.modes = termios.tcgetattr(self.fd)
        kept = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
        self.process = subprocess.Popen(
            argv, stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
            env=kept | {"PYTHONPATH": SOURCE, "TERM": "xterm"} | env,
            preexec_fn=_as_a_login,  # noqa: PLW1509 - nothing else gives it this terminal
        )  # fmt: skip
        os.close(slave)

    def resize(self, columns: int, rows: int) -> None:
        fcntl.ioctl(self.fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def type(self, keys: bytes) -> None:
        os.write(self.fd, keys)

    @property
    def lines(self) -> list[str]:
        """The last whole picture, as it is seen."""
        frame = self.said.rpartition(b"\x1b[J")[0].rpartition(b"\x1b[H")[2].decode()
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", frame).replace("\r", "").split("\n")

    def until(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while not condition():
            if time.monotonic() > deadline:
                pytest.fail(f"waited in vain for {what}; it says {self.said[-2000:]!r}")
            self.read(0.1)

    def read(self, timeout_s: float) -> bool:
        """What has come since; false at the end."""
        if not select.select([self.fd], (), (), timeout_s)[0]:
            return True
        try:
            came = os.read(self.fd, 65536)
        except OSError:  # nobody has the other side open any more
            came = b""
        self.said += came
        return bool(came)

    def shows(self, text: str) -> None:
        self.until(lambda: any(text in line for line in self.lines), text)

    def end(self) -> int:
        """The exit code, with everything said before."""
        self.until(lambda: self.process.poll() is not None, "its end")
        while self.read(0) and select.select([self.fd], (), (), 0)[0]:
            pass
        return self.process.returncode

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(10)
        if self.fd >= 0:
            os.close(self.fd)

    @property
    def restored(self) -> bool:
        return self.said.rpartition(ENTER)[2].count(LEAVE) == 1 and termios.tcgetattr(self.fd) == self.modes


def command(node: Server, gateway: str) -> list[str]:
    url = ["--url", node.served.url, "--gateway-url", gateway, "--interval", "0.2"]
    return [sys.executable, "-m", "pool_managerd.cli", "top", *url]


@pytest.fixture
def terminal(node: Server, gateway: Gateway) -> Iterator[Terminal]:
    found = Terminal(command(node, gateway.url))
    yield found
    found.close()


def test_it_draws_and_q_gives_the_terminal_back(terminal: Terminal) -> None:
    terminal.shows("demo ready")
    terminal.until(lambda: any("182 ms" in line for line in terminal.lines), "rates")
    assert terminal.said.startswith(ENTER) and termios.tcgetattr(terminal.fd) != terminal.modes
    assert len(terminal.lines) <= 24 and max(map(len, terminal.lines)) <= 80
    assert b"\x1b[32mready" in terminal.said, "in colours"
    terminal.type(b"x\x1b[A")
    terminal.type(b"q")
    assert terminal.end() == 0 and terminal.restored
    assert terminal.said.endswith(LEAVE), "nothing comes behind it"


def test_it_is_drawn_anew_for_another_size(terminal: Terminal) -> None:
    terminal.shows("TEMP")
    terminal.resize(40, 8)
    terminal.until(lambda: 1 < len(terminal.lines) <= 8 and max(map(len, terminal.lines)) <= 40, "a small picture")
    terminal.resize(160, 50)
    terminal.shows("http://127.0.0.1")
    terminal.type(b"Q")
    assert terminal.end() == 0 and terminal.restored


def test_ctrl_c_is_an_end_like_any_other(terminal: Terminal) -> None:
    terminal.shows("demo ready")
    terminal.type(b"\x03")
    assert terminal.end() == 0 and terminal.restored and b"Traceback" not in terminal.said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_it_behind_a_terminal_that_is_as_it_was(terminal: Terminal, number: signal.Signals) -> None:
    terminal.shows("demo ready")
    terminal.process.send_signal(number)
    assert terminal.end() == 128 + number and terminal.restored and b"Traceback" not in terminal.said


def test_ctrl_z_stops_it_and_it_comes_back(node: Server, gateway: Gateway) -> None:
    words = " ".join(f"'{word}'" for word in command(node, gateway.url))
    terminal = Terminal(["/bin/bash", "-c", f"set -m; {words}; stty -a; echo stopped; fg >/dev/null; echo ended $?"])
    try:
        terminal.shows("demo ready")
        terminal.type(b"\x1a")
        terminal.until(lambda: LEAVE in terminal.said and ENTER in terminal.said.partition(b"stopped")[2], "it to come back")
        assert b" icanon" in terminal.said and b" echo " in terminal.said, "the terminal was the shell's meanwhile"
        terminal.shows("demo ready")
        terminal.type(b"q")
        terminal.until(lambda: b"ended 0" in terminal.said, "its end")
        assert terminal.restored
    finally:
        terminal.close()


def test_a_daemon_that_goes_away_leaves_its_picture_until_it_is_back(gateway: Gateway) -> None:
    node = whole(Server())
    terminal = Terminal(command(node, gateway.url))
    try:
        terminal.shows("demo ready")
        node.close()
        terminal.shows("away since")
        assert any("demo ready" in line for line in terminal.lines)
        node = whole(Server(bind=f"127.0.0.1:{node.served.port}"))
        node.node.add("later")
        terminal.shows("later ready")
        assert not any("away since" in line for line in terminal.lines)
        terminal.type(b"q")
        assert terminal.end() == 0
    finally:
        terminal.close()
        node.close()


def test_a_daemon_that_is_slow_does_not_keep_the_screen(terminal: Terminal, node: Server) -> None:
    terminal.shows("demo ready")
    go_on = threading.Event()
    node.soon(go_on.wait)
    try:
        terminal.shows("it does not answer")
        terminal.resize(60, 24)
        terminal.until(lambda: max(map(len, terminal.lines)) <= 60, "another size")
        terminal.type(b"q")
        assert terminal.end() == 0 and terminal.restored
    finally:
        go_on.set()


def test_a_refusal_is_told_behind_the_screen(terminal: Terminal, node: Server) -> None:
    terminal.shows("demo ready")
    node.node.fail_next = RequestError("it is closed", code="FORBIDDEN", status=403)
    assert terminal.end() == 4 and terminal.restored
    assert terminal.said.partition(LEAVE)[2].startswith(b"it is closed")


def test_it_ends_with_its_terminal(terminal: Terminal) -> None:
    terminal.shows("demo ready")
    os.close(terminal.fd)
    terminal.fd = -1
    assert terminal.process.wait(DEADLINE_S) == 1, "what it said last was lost"


def test_a_terminal_that_can_do_nothing_gets_one_picture(node: Server, gateway: Gateway) -> None:
    argv = command(node, gateway.url)[:-2]
    terminal = Terminal(argv, TERM="dumb")
    try:
        assert terminal.end() == 0 and b"\x1b" not in terminal.said and b"demo ready" in terminal.said
    finally:
        terminal.close()
