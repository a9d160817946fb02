"""Failpoints: inert unless a test's flag is set, each place in the source, each action doing what it says."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from pool_managerd import failpoints
from pool_managerd.errors import SpecError
from pool_managerd.failpoints import FLAG, PLACES, WANTED, FailpointError, arm, reach
from tests.test_layers import sources

ON = {FLAG: "1"}


@pytest.fixture(autouse=True)
def _inert_again() -> Iterator[None]:
    yield
    arm({})


def test_nothing_happens_without_the_flag_and_that_is_told() -> None:
    assert arm({}) is None and not failpoints.armed
    told = arm({WANTED: "state.commit=panic"})
    assert told is not None and FLAG in told and not failpoints.armed
    reach("state.commit")
    assert arm({WANTED: "state.commit=panic", FLAG: "0"}) is not None and not failpoints.armed
    reach("state.commit")


def test_an_error_comes_as_often_as_it_is_wanted_and_only_there() -> None:
    told = arm({**ON, WANTED: "state.commit=1+2*error; leases.commit=error"})
    assert told is not None and "on purpose" in told and failpoints.armed
    reach("state.commit")
    for _ in range(2):
        with pytest.raises(FailpointError, match=r"state\.commit"):
            reach("state.commit")
    reach("state.commit")
    reach("state.committed")
    for _ in range(3):
        with pytest.raises(OSError, match=r"leases\.commit"):
            reach("leases.commit")


def test_a_delay_waits() -> None:
    arm({**ON, WANTED: "api.before_reply=1*delay(50)"})
    began = time.monotonic()
    reach("api.before_reply")
    assert time.monotonic() - began >= 0.05


def test_a_panic_is_a_sigkill() -> None:
    code = "import os; from pool_managerd import failpoints as f; f.arm(os.environ); f.reach('boot.restored'); print('lives')"
    ended = subprocess.run(
        [sys.executable, "-c", code], env={**ON, WANTED: "boot.restored=1*panic"}, capture_output=True, timeout=20, check=False
    )
    assert (ended.returncode, ended.stdout) == (-9, b"")


@pytest.mark.parametrize("wanted", ["nowhere=panic", "state.commit", "state.commit=explode", "state.commit=x*panic", "=panic"])
def test_what_is_not_understood_is_refused(wanted: str) -> None:
    with pytest.raises(SpecError, match=re.escape(wanted)):
        arm({**ON, WANTED: wanted})


def test_every_place_is_in_the_source_and_no_other() -> None:
    there = [name for path in sources() for name in re.findall(r'failpoints\.reach\("([^"]+)"\)', path.read_text("utf-8"))]
    assert sorted(there) == sorted(PLACES)
