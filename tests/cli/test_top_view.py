"""The picture: what it says at 80 columns, and that it is never larger than asked for."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pool_managerd.cli.table import width
from pool_managerd.cli.top_rates import Rate
from pool_managerd.cli.top_snapshot import GatewayAnswers, NodeAnswers, Snapshot
from pool_managerd.cli.top_view import lines
from tests.api.fake_devices import UUID_0, busy_device, device, gone_device, lost_device
from tests.cli.top_samples import NO_GPUS, NOW_MS, pool, shot, ticket


@pytest.fixture(autouse=True)
def _utc() -> Iterator[None]:
    before = os.environ.get("TZ")
    os.environ["TZ"] = "UTC"
    time.tzset()
    yield
    del os.environ["TZ"]
    if before is not None:
        os.environ["TZ"] = before
    time.tzset()


def drawn(found: Snapshot, columns: int = 80, rows: int | None = 24) -> list[str]:
    return [str(line) for line in lines(found, columns, rows)]


ERROR = {"ts_ms": NOW_MS - 5000, "level": "error", "pool_id": "demo", "human": "Engine of pool 'demo' exited with code 1"}
LOADING = {"elapsed_ms": 9_000, "human": "Loading"}
BUSY = """\
11:06:40 pool-managerd 1.2.3  2/4 pools ready  3 in flight  1 waiting  118 tok/s

GPU   # pools  x others  + kept  . free                    USED BUSY  TEMP STATE
GPU 0 [##############xx=++++++++++...............] 9.5/24.0 GiB 98 % 61 °C ok
GPU 1 [=.........................................] 0.5/24.0 GiB  0 % 41 °C ok

POOL STATE                  SLOTS WAIT REQ/S TOK/S  FIRST    VRAM IDLE
chat ready                    4/4    1   1.2   118 182 ms       -    -
late starting: 9 s, Loading     0    0   0.0   0.0      - 0.0 GiB    -
demo ready                    0/4    0   0.0   0.0      - 8.0 GiB  3 h
off  offline                  0/4    0   0.0   0.0      -       -    -

WAITING PLACE SINCE FOR
chat        1   1 s a slot: 4 leases are held, by gateway (4)

11:06:35 error Engine of pool 'demo' exited with code 1
"""


def test_a_busy_node_fits_on_80_columns() -> None:
    pools = (
        pool("chat", active_leases=4, waiting=1, idle_ms=None), pool("demo", idle_ms=3_600_000 * 3),
        pool("late", state="starting", ready=False, slots_total=None, idle_ms=None, preload=LOADING),
        pool("off", state="offline", ready=False, idle_ms=None),
    )  # fmt: skip
    devices = {"devices": [busy_device(), device(1)], "simulated": False}
    gateway = GatewayAnswers("http://g", 3, {"chat": Rate(1.25, 117.6, 182)})
    found = drawn(shot(*pools, devices=devices, gateway=gateway, queue=(ticket(1),), last_error=ERROR))
    assert "\n".join(found) + "\n" == BUSY


def test_without_a_gateway_its_columns_are_empty_and_a_word_says_so_once() -> None:
    gateway = GatewayAnswers("http://g", problem="cannot reach the gateway at http://g: refused")
    found = drawn(shot(pool("chat"), gateway=gateway))
    assert found[1] == "no rates: cannot reach the gateway at http://g: refused"
    assert found[-1].split() == ["chat", "ready", "0/4", "0", "-", "-", "-", "-", "60", "s"]
    assert sum("gateway" in line for line in found) == 1


def test_the_ram_is_shown_where_there_is_no_gpu() -> None:
    found = drawn(shot(pool("chat"), devices=NO_GPUS))
    assert found[2] == f"RAM [{'#' * 14}{'.' * 41}] 16.0/64.0 GiB used"
    assert not any("driver" in line for line in found), "that is how this machine is"


def test_an_away_daemon_leaves_its_last_picture() -> None:
    found = drawn(shot(pool("chat"), away=(NOW_MS - 60_000, "cannot reach the daemon at http://d: refused")))
    assert found[1] == "away since 11:05:40: cannot reach the daemon at http://d: refused"
    assert found[-1].startswith("chat ready")


@pytest.mark.parametrize(
    ("row", "yields", "said"),
    [
        (device(), (), "ok"),
        (device(cordoned=True), (), "cordoned"),
        (lost_device(cordoned=True), (), "quarantined, cordoned"),
        (device(), ({"uuid": UUID_0, "until_ms": None},), "yielded"),
        (device(), ({"uuid": UUID_0, "until_ms": NOW_MS + 3_600_000},), "yielded until 12:06"),
        (device(), ({"uuid": UUID_0, "until_ms": NOW_MS + 86_400_000},), "yielded until 11-19"),
        (lost_device(), ({"uuid": UUID_0, "until_ms": None},), "quarantined, yielded"),
        (gone_device(device="1"), (), "quarantined"),
    ],
)
def test_a_gpu_says_what_is_with_it(row: dict[str, Any], yields: tuple[dict[str, Any], ...], said: str) -> None:
    (line,) = (
        line for line in drawn(shot(devices={"devices": [row]}, yields=yields)) if line.startswith("GPU") and "#" not in line
    )
    assert line.endswith(f" {said}")


def test_gpus_that_cannot_be_read_are_told() -> None:
    stale = {"devices": [device()], "stale": True, "problem": {"message": "NVML hangs"}}
    assert drawn(shot(devices=stale))[1] == "the GPUs cannot be read: NVML hangs"


def test_rows_that_do_not_fit_are_counted_and_every_list_keeps_a_part() -> None:
    pools = [pool(f"p{number:02}") for number in range(30)]
    devices = {"devices": [device(number) for number in range(12)]}
    found = drawn(shot(*pools, devices=devices, queue=tuple(map(ticket, range(1, 9))), last_error=ERROR))
    assert len(found) == 24
    told = [line for line in found if line.startswith("…")]
    assert [told[0][-4:], told[1][-5:], told[2][-8:]] == ["GPUs", "pools", "requests"]
    assert "exited with code 1" in found[-1]
    hidden = [int(line.split()[2]) for line in told]
    assert sum(1 for line in found if line.startswith("p")) + hidden[1] == 30
    assert len(drawn(shot(*pools, devices=devices), rows=None)) == 1 + 1 + 13 + 1 + 31, "in a pipe there is no end"


def test_what_engines_and_others_say_cannot_steer_the_terminal() -> None:
    evil = "x\x1b[2J\r\n\u202e"
    error = {"ts_ms": NOW_MS, "level": evil, "human": evil, "pool_id": evil}
    found = shot(
        pool(evil, state=evil, ready=False, last_error=evil), devices={"devices": [device(device=evil, state=evil)]},
        queue=(ticket(1, pool_id=evil, waits_for=evil),), last_error=error, away=(NOW_MS, evil),
        gateway=GatewayAnswers(evil, problem=evil),
    )  # fmt: skip
    text = "".join(drawn(found, 200))
    assert not {"\x1b", "\r", "\n", "\u202e"} & set(text)


def test_a_command_in_a_text_is_as_it_can_be_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pool_managerd.cli.output.program", lambda: "bin/pool-managerd")
    found = drawn(shot(gateway=GatewayAnswers("", problem="run pool-managerd gateway")))
    assert found[1] == "no rates: run bin/pool-managerd gateway"


NAMES = st.text(max_size=40)
MS = st.integers(0, 4 * 10**12)
SOME_POOLS = st.builds(
    pool, NAMES, state=st.sampled_from(["ready", "starting", "draining", "backoff", "failed", "offline"]), ready=st.booleans(),
    active_leases=st.integers(0, 10**6), slots_total=st.none() | st.integers(0, 10**6), waiting=st.integers(0, 10**6),
    idle_ms=st.none() | MS, last_error=st.none() | NAMES, next_restart_at_ms=st.none() | MS, held=st.booleans(),
    preload=st.none() | st.fixed_dictionaries({"elapsed_ms": MS, "human": NAMES, "bytes_done": MS, "bytes_total": MS}),
    drain=st.none() | st.fixed_dictionaries({"left": MS, "remaining_ms": MS}),
)  # fmt: skip
GPUS = st.sampled_from([busy_device, device, lost_device, gone_device])
SOME_GPUS = st.builds(
    lambda make, **changes: make(**changes), GPUS, device=NAMES, state=NAMES, cordoned=st.booleans(),
    utilization_percent=st.none() | st.integers(0, 100), temperature_c=st.none() | st.integers(-50, 200),
)  # fmt: skip
SOME_TICKETS = st.builds(ticket, st.integers(0, 10**6), pool_id=NAMES, waits_for=NAMES, estimate_ms=st.none() | MS)
RATES = st.builds(Rate, st.floats(0, 1e9), st.floats(0, 1e9), st.none() | st.floats(0, 1e9))
SNAPSHOTS = st.builds(
    Snapshot, MS, NAMES,
    st.builds(
        NodeAnswers, st.none() | NAMES, NAMES, st.lists(SOME_POOLS, max_size=6).map(tuple),
        st.just(NO_GPUS) | st.fixed_dictionaries({"devices": st.lists(SOME_GPUS, max_size=5), "stale": st.booleans()}),
        st.none() | st.lists(SOME_TICKETS, max_size=5).map(tuple),
        st.none() | st.lists(st.fixed_dictionaries({"uuid": st.just(UUID_0), "until_ms": st.none() | MS})).map(tuple),
        st.none() | st.fixed_dictionaries({"ts_ms": MS, "level": NAMES, "pool_id": st.none() | NAMES, "human": NAMES}),
    ),
    st.builds(GatewayAnswers, NAMES, st.none() | MS, st.none() | st.dictionaries(NAMES, RATES, max_size=4), st.none() | NAMES),
    st.none() | st.tuples(MS, NAMES),
)  # fmt: skip


@given(SNAPSHOTS, st.integers(20, 300), st.none() | st.integers(1, 60))
def test_no_picture_is_larger_than_its_terminal(found: Snapshot, columns: int, rows: int | None) -> None:
    picture = drawn(found, columns, rows)
    assert all(width(line) <= columns for line in picture)
    assert all(sign.isprintable() for line in picture for sign in line)
    assert rows is None or len(picture) <= rows


@given(SNAPSHOTS, st.integers(20, 300))
def test_the_same_snapshot_is_the_same_picture(found: Snapshot, columns: int) -> None:
    assert drawn(found, columns) == drawn(found, columns)
