"""The rows of a snapshot: their order, what they say of a pool and a GPU, and the same for machines."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pool_managerd.cli.top_rates import Rate
from pool_managerd.cli.top_snapshot import GatewayAnswers, as_json, gpu_rows, pool_rows, recent_error, totals, waiting_rows
from tests.api.fake_devices import MIB, UUID_0, busy_device, device, gone_device, lost_device
from tests.cli.top_samples import NOW_MS, pool, shot, ticket


def ids(*pools: dict[str, Any], rates: dict[str, Rate] | None = None) -> list[str]:
    return [row.pool_id for row in pool_rows(shot(*pools, rates=rates))]


def test_busy_pools_come_first_and_those_that_are_down_last() -> None:
    down, idle = pool("a", state="offline", ready=False, idle_ms=None), pool("b")
    assert ids(down, pool("d", active_leases=1), idle, pool("c", waiting=1)) == ["c", "d", "b", "a"]
    assert ids(down, idle, pool("z", state="starting", ready=False)) == ["z", "b", "a"]


def test_a_pool_stays_in_front_between_two_requests() -> None:
    assert ids(pool("a"), pool("b", idle_ms=9_000)) == ["b", "a"]
    assert ids(pool("a"), pool("b", idle_ms=10_000)) == ["a", "b"]
    assert ids(pool("a"), pool("b"), rates={"b": Rate(0.1, 0, None)}) == ["b", "a"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"preload": {"human": "The engine is loading", "elapsed_ms": 3000}}, "3 s, The engine is loading"),
        ({"preload": {"bytes_done": 43, "bytes_total": 100, "elapsed_ms": 3000}}, "43 %, 3 s"),
        ({"drain": {"left": 2, "remaining_ms": 8000}}, "2 requests left, 8 s"),
        ({"ready": False, "state": "backoff", "next_restart_at_ms": NOW_MS + 4000, "last_error": "exit_code=1"},
         "for 4 s: exit_code=1"),
        ({"ready": False, "state": "failed", "reason": "config_error"}, "config_error"),
        ({"reload": "staging"}, "reload staging"),
        ({"held": True}, "held"),
        ({"ready": False, "state": "offline", "last_error": "long ago"}, None),
        ({"last_error": "before it was ready"}, None),
    ],
)  # fmt: skip
def test_beside_the_state_stands_how_far_it_is_or_why(changes: dict[str, Any], said: str | None) -> None:
    assert pool_rows(shot(pool("chat", **changes)))[0].detail == said


def test_what_is_left_of_a_load_is_as_whoever_waits_is_told() -> None:
    loading = pool("chat", state="starting", ready=False, preload={"elapsed_ms": 3000})
    assert pool_rows(shot(loading, queue=(ticket(1, estimate_ms=12_000),)))[0].detail == "12 s left"


def test_vram_is_what_is_held_on_all_gpus() -> None:
    devices = {"devices": [busy_device(), busy_device()]}
    rows = pool_rows(shot(pool("demo"), pool("late"), pool("other"), devices=devices))
    assert {row.pool_id: row.vram_bytes for row in rows} == {"demo": 2 * 8_192 * MIB, "late": 0, "other": None}


@pytest.mark.parametrize("row", [busy_device(), device(), device(vram_available_bytes=0, kept_for="x"), lost_device()])
def test_a_gpus_parts_add_up_to_its_memory(row: dict[str, Any]) -> None:
    (gpu,) = gpu_rows(shot(devices={"devices": [row]}))
    parts = (gpu.pools_bytes, gpu.kept_bytes, gpu.others_bytes, gpu.driver_bytes, gpu.free_bytes, gpu.unknown_bytes)
    assert sum(parts) == gpu.total_bytes == row["vram_total_bytes"]


def test_what_is_free_for_pools_is_told_from_what_is_kept() -> None:
    (gpu,) = gpu_rows(shot(devices={"devices": [busy_device()]}))
    assert (gpu.pools_bytes, gpu.others_bytes, gpu.kept_bytes) == (8_192 * MIB, 1_024 * MIB, (2_048 + 4_096) * MIB)
    (gpu,) = gpu_rows(shot(devices={"devices": [device(vram_available_bytes=1_000 * MIB)]}))
    assert (gpu.free_bytes, gpu.kept_bytes) == (1_000 * MIB, 23_064 * MIB)
    (gpu,) = gpu_rows(shot(devices={"devices": [lost_device()]}))
    assert gpu.others_bytes == 0 and gpu.unknown_bytes > 0
    (gpu,) = gpu_rows(shot(devices={"devices": [gone_device(device="1")]}))
    assert gpu.total_bytes == 0


def test_a_yielded_gpu_says_until_when() -> None:
    told = shot(devices={"devices": [device(), device(1)]}, yields=({"uuid": UUID_0, "until_ms": 7},))
    assert [(gpu.yielded, gpu.yielded_until_ms) for gpu in gpu_rows(told)] == [(True, 7), (False, None)]


def test_who_waits_longest_comes_first() -> None:
    found = waiting_rows(shot(queue=(ticket(1), ticket(3), ticket(2))))
    assert [row["ticket_id"] for row in found] == ["t3", "t2", "t1"]


def test_an_error_is_told_while_it_is_recent() -> None:
    assert recent_error(shot(last_error={"ts_ms": NOW_MS - 599_000})) is not None
    assert recent_error(shot(last_error={"ts_ms": NOW_MS - 600_000})) is None


def test_without_a_gateway_slots_in_use_are_what_is_in_flight() -> None:
    pools = pool("a", active_leases=2), pool("b", active_leases=1, waiting=2)
    away = GatewayAnswers("http://g", problem="it is away")
    assert totals(shot(*pools, gateway=away, queue=None)) == {
        "pools_ready": 2, "pools": 2, "in_flight": 3, "waiting": 2, "tokens_per_s": None,
    }  # fmt: skip
    known = GatewayAnswers("http://g", 1, {"a": Rate(1, 20, None), "gone": Rate(0, 5, None)})
    found = totals(shot(*pools, gateway=known))
    assert (found["in_flight"], found["waiting"], found["tokens_per_s"]) == (1, 0, 25)


def test_machines_get_the_same() -> None:
    found = as_json(shot(pool("a"), rates={"a": Rate(1, 20, 30)}, queue=None, away=(5, "gone")))
    assert json.loads(json.dumps(found)) == found
    assert found["daemon"]["away_since_ms"] == 5 and found["queue"] is None
    assert found["pools"][0]["tokens_per_s"] == 20 and found["devices"][0]["total_bytes"] == 24_564 * MIB
