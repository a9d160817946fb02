"""Places where a test can have the daemon die, fail or wait: ``PM_FAILPOINTS="state.commit=1*panic;leases.commit=delay(200)"``.

Nothing happens unless ``POOL_MANAGERD_TEST_FAILPOINTS=1`` is in the environment as well; a variable alone is told and ignored. A
place costs one look at a variable then. This module knows nobody, so that every layer but the core may use it.

An action is ``panic`` (SIGKILL of this process: no goodbye), ``error`` (FailpointError, an OSError with EIO) or ``delay(MS)``,
which blocks the thread that comes by. ``2*error`` does it twice and then no more; ``3+1*panic`` lets three pass before that.
"""

from __future__ import annotations

import errno
import os
import re
import signal
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass

from pool_managerd.errors import SpecError

WANTED = "PM_FAILPOINTS"
FLAG = "POOL_MANAGERD_TEST_FAILPOINTS"
PLACES = (
    "state.commit", "state.committed", "leases.commit", "leases.committed", "api.before_reply", "engine.spawned", "engine.kept",
    "pid.write", "handoff.write", "boot.restored", "boot.leases", "boot.adopting", "boot.cleared", "boot.started", "loop.health",
    "loop.pool", "loop.task", "reload.staging", "reload.begun", "reload.loading", "reload.loaded", "reload.draining",
    "reload.asleep", "reload.switching", "reload.switched", "reload.proven", "reload.committed", "reload.taken_over",
    "reload.undoing", "apply.begun", "apply.step",
)  # fmt: skip
"""Every place. ``X.commit`` is before, ``X.committed`` behind; ``engine.spawned`` is before the shim is told to keep it."""

armed = False
_ACTION = re.compile(r"(?:(\d{1,6})\+)?(?:(\d{1,6})\*)?(panic|error|delay\((\d{1,6})\))")
_lock = threading.Lock()
_points: dict[str, _Point] = {}


class FailpointError(OSError):
    """What ``error`` raises."""


@dataclass(slots=True)
class _Point:
    """``skip`` times it is passed by, ``left`` times it acts (-1: always). ``delay_ms`` of a delay."""

    skip: int
    left: int
    action: str
    delay_ms: int


def arm(env: Mapping[str, str]) -> str | None:
    """Take up what ``env`` wants; what is to be told about it, if anything. Raises SpecError for what is not understood."""
    global armed  # noqa: PLW0603 - one process, one set of failpoints
    wanted = env.get(WANTED)
    _points.clear()
    armed = False
    if wanted is None:
        return None
    if env.get(FLAG) != "1":
        return f"{WANTED} is ignored: it is for tests, which set {FLAG}=1 as well"
    _points.update(_point(part.strip()) for part in wanted.split(";") if part.strip())
    armed = bool(_points)
    return f"Failpoints are armed, this daemon will fail on purpose: {wanted}"


def reach(place: str) -> None:
    """Do what a test wants to happen here. Raises FailpointError."""
    if not armed:
        return
    with _lock:
        point = _points.get(place)
        if point is None or point.left == 0:
            return
        if point.skip > 0:
            point.skip -= 1
            return
        point.left -= point.left > 0
    if point.action == "panic":
        os.kill(os.getpid(), signal.SIGKILL)
    elif point.action == "error":
        raise FailpointError(errno.EIO, f"failpoint {place}")
    else:
        time.sleep(point.delay_ms / 1000)


def _point(text: str) -> tuple[str, _Point]:
    place, _, wanted = text.partition("=")
    found = _ACTION.fullmatch(wanted)
    if place not in PLACES or found is None:
        raise SpecError(f"cannot use {text!r} in {WANTED}", code="CONFIG_ERROR", hint="NAME=[SKIP+][TIMES*]panic|error|delay(MS)")
    skip, times, action, delay = found.groups()
    return place, _Point(int(skip or 0), -1 if times is None else int(times), action.partition("(")[0], int(delay or 0))
