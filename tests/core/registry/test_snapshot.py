"""A pool's row as it travels: complete after JSON, and read as far as it goes from any version."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from pool_managerd.core.registry import DeviceShare, PerfHints, PoolSnapshot, Registry
from pool_managerd.core.registry.placement import PlacementRequest, decide
from pool_managerd.core.registry.snapshot import unknown
from pool_managerd.errors import SpecError

GIB = 1 << 30


def full() -> PoolSnapshot:
    registry = Registry(lambda: 0)
    registry.register("a")
    registry.publish(
        "a", state="ready", quant="Q8_0", ctx_max=4096, vram_free_bytes=GIB, compute_capability="8.6",
        perf_hints=PerfHints(90.5, None, ("Q8_0",)), devices=(DeviceShare(0, "0", "GPU-0", None, 3, None, 1, 2, 1),),
        model_id="m", vram_reserved_bytes=2, vram_used_bytes=1, node_id="n",
    )  # fmt: skip
    registry.set_health("a", live=True, ready=True)
    return registry.snapshots()[0]


def test_a_snapshot_survives_json() -> None:
    assert PoolSnapshot.from_dict(json.loads(json.dumps(full().to_dict()))) == full()


def test_a_snapshot_of_another_version_is_read_as_far_as_it_goes() -> None:
    raw = json.loads(json.dumps(full().to_dict()))
    for name in raw.keys() - {"pool_id"}:
        assert PoolSnapshot.from_dict({key: value for key, value in raw.items() if key != name}).pool_id == "a"
        assert PoolSnapshot.from_dict(raw | {name: object()}).pool_id == "a"
    new = PoolSnapshot.from_dict(raw | {"later": 1, "ready": 1, "ctx_max": True, "perf_hints": {"perf_tokens_per_s": 7}})
    assert (new.ready, new.ctx_max, new.perf_hints) == (False, None, PerfHints(7.0))
    assert decide(PlacementRequest(), [PoolSnapshot.from_dict({"pool_id": "a"})]).pool_id is None
    with pytest.raises(SpecError, match="no pool_id"):
        PoolSnapshot.from_dict({})


def test_what_is_no_device_is_left_out_and_what_a_device_does_not_say_is_nothing() -> None:
    read = PoolSnapshot.from_dict({"pool_id": "a", "devices": [{"uuid": "GPU-1"}, "x"], "models_available": ["m", 5]})
    assert read.devices == (DeviceShare(-1, "", "GPU-1", None, 0, None, 0),) and read.models_available == ("m",)
    assert PoolSnapshot.from_dict({"pool_id": "a", "devices": "x", "models_available": "m"}) == unknown("a")
    assert unknown("a").devices == () and unknown("a").models_available == ()


@pytest.mark.parametrize(
    ("reserved", "used", "room"), [(None, None, 10), (None, 3, 10), (5, None, 10), (5, 3, 12), (3, 5, 10), (0, 0, 10)]
)
def test_the_room_of_a_pool_is_what_may_be_reserved_and_what_it_has_not_used_yet(
    reserved: int | None, used: int | None, room: int
) -> None:
    pool = replace(full(), vram_available_bytes=10, vram_reserved_bytes=reserved, vram_used_bytes=used)
    assert pool.vram_room_bytes == room
    assert replace(pool, vram_available_bytes=None).vram_room_bytes == GIB
