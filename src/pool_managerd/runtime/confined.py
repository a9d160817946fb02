"""Asking a program what it is: run to its end as an engine would be, and nothing of it stays."""

from __future__ import annotations

import base64
import json
import os
import select
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

from pool_managerd.core.artifacts import ProgramAnswer
from pool_managerd.errors import PoolError
from pool_managerd.runtime import oneshot
from pool_managerd.runtime.engine_users import EngineUsers
from pool_managerd.runtime.reach import User
from pool_managerd.runtime.removal import remove_where

_SCRIPT = os.path.abspath(oneshot.__file__)
_OVERDUE_SECONDS = 8.0
_LIMITS = {"NPROC": 512, "FSIZE": 64 << 20, "NOFILE": 4096}


class ConfinedRun:
    """Runs programs one after the other, under a uid that no engine has when this process is root."""

    def __init__(self, users: EngineUsers, python: str = sys.executable) -> None:
        self._users = users
        self._python = python
        self._lock = threading.Lock()

    def __call__(self, argv: Sequence[str], env: Mapping[str, str], timeout_s: float, max_bytes: int) -> ProgramAnswer:
        """Blocks for ``timeout_s`` and a little at most. Never raises: what went wrong is in the answer."""
        try:
            user = self._users.of_probes() if os.geteuid() == 0 else None
        except PoolError as error:
            return ProgramAnswer(b"", f"cannot be run: {error.message}")
        limits = {name: value for name, value in _LIMITS.items() if name != "NPROC" or user is not None}
        order = {
            "program": os.path.abspath(argv[0]), "argv": list(argv), "cwd": "/",
            "credentials": user.to_json() if user else None, "limits": limits,
            "timeout_s": timeout_s, "max_bytes": max_bytes,
        }  # fmt: skip
        with self._lock, _scratch(user) as places:
            return self._ask({**order, "env": {**env, **places}, "temporary": places.get("TMPDIR")}, timeout_s)

    def _ask(self, order: Mapping[str, object], timeout_s: float) -> ProgramAnswer:
        try:
            process = subprocess.Popen(
                [self._python, "-I", "-S", _SCRIPT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                start_new_session=True, cwd="/", env={},
            )  # fmt: skip
        except OSError as error:
            return ProgramAnswer(b"", f"cannot be run: {error.strerror or error}")
        with process:
            try:
                answer = _exchange(process, json.dumps(order).encode() + b"\n", timeout_s + _OVERDUE_SECONDS)
            finally:
                process.kill()  # it has ended, or is stuck
        return answer_of(answer, timeout_s)


@contextmanager
def _scratch(user: User | None) -> Iterator[Mapping[str, str]]:
    """Where a temporary directory of the program's own is, which goes with all that it left there; empty where none can be."""
    try:
        made = tempfile.mkdtemp(prefix="pm-probe-")
    except OSError:
        yield {}
        return
    try:
        with suppress(OSError):
            if user is not None:
                os.chown(made, user.uid, user.gid)
        yield {"TMPDIR": made}
    finally:
        parent, name = os.path.split(made)
        remove_where(parent, lambda _, found: found == name)


def _exchange(process: subprocess.Popen[bytes], order: bytes, timeout_s: float) -> bytes:
    """What it answers to ``order``. Its stdin stays open meanwhile: its end tells it that nobody waits any more."""
    if process.stdin is None or process.stdout is None:
        return b""
    try:
        process.stdin.write(order)
        process.stdin.flush()
    except OSError:
        return b""
    fd, until, answer = process.stdout.fileno(), time.monotonic() + timeout_s, bytearray()
    poll = select.poll()  # select(2) knows no descriptor above 1023
    poll.register(fd, select.POLLIN)
    while (left := until - time.monotonic()) > 0 and poll.poll(left * 1000):
        data = os.read(fd, 65536)
        if not data:
            break
        answer += data
    return bytes(answer)


def answer_of(line: bytes, timeout_s: float) -> ProgramAnswer:
    """The runner's words as what is told of the program."""
    try:
        told = json.loads(line)
        output, code, failed = base64.b64decode(told["output"]), told["code"], told["failed"]
    except (ValueError, TypeError, KeyError):
        return ProgramAnswer(b"", "could not be asked: the process that runs it gave no answer")
    if failed:
        step, _, number = failed.rpartition(":")
        reason = os.strerror(int(number)) if number.isdecimal() and int(number) else f"step {step} failed"
        return ProgramAnswer(output, f"cannot be run: {reason}")
    if code is None:
        return ProgramAnswer(output, f"gave no answer within {timeout_s:g} s" if not output else "does not end")
    if code:
        return ProgramAnswer(output, f"was ended by signal {-code}" if code < 0 else f"exited with code {code}")
    return ProgramAnswer(output)
