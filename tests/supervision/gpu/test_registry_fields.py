"""What placement is told of each pool's part of the GPUs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pool_managerd.core.gpu.accounts import Reservation, account
from pool_managerd.core.instance_id import InstanceId
from pool_managerd.supervision.gpu.registry_fields import GpuFields
from tests.core.gpus import GIB, gpu, process


def fields(*devices: Any, reserved: dict[str, dict[int, int]], exclusive: str = "", owners: dict[int, str] | None = None) -> Any:
    """``reserved``: GiB by pool and index."""
    ledger = [
        Reservation(InstanceId(pool), 1, {devices[index].uuid: gib * GIB for index, gib in parts.items()}, pool == exclusive)
        for pool, parts in reserved.items()
    ]
    by_pid = {pid: InstanceId(pool) for pid, pool in (owners or {}).items()}
    found = GpuFields(account(devices, ledger, by_pid))
    return lambda pool, *indices: found.of(pool, tuple(devices[index].uuid for index in indices))


def test_a_pool_is_told_its_own_part_of_each_gpu_and_what_is_left_for_it() -> None:
    shared = gpu(1, 12, free_gib=3, processes=(process(41, 2), process(42, 7)))
    see = fields(gpu(0, 24), shared, reserved={"large": {0: 6, 1: 3}, "code": {1: 7}}, owners={41: "large", 42: "code"})
    large, other = see("large", 0, 1), see("other", 0, 1)
    assert [(s.vram_reserved_bytes, s.vram_used_bytes) for s in large["devices"]] == [(6 * GIB, None), (3 * GIB, 2 * GIB)]
    assert (large["vram_reserved_bytes"], large["vram_used_bytes"]) == (9 * GIB, None)
    assert large["vram_available_bytes"] == other["vram_available_bytes"] == 20 * GIB
    assert (other["vram_reserved_bytes"], other["vram_used_bytes"]) == (0, 0)
    assert other is see("third", 0, 1), "pools that hold nothing share their fields"
    code = see("code", 1)
    assert (code["vram_reserved_bytes"], code["vram_used_bytes"], code["vram_free_bytes"]) == (7 * GIB, 7 * GIB, 3 * GIB)
    assert set(see("nobody").values()) == {None, ()}


def test_nothing_is_left_for_others_where_a_pool_is_exclusive_not_on_its_siblings_either() -> None:
    whole = replace(gpu(0, 80), mig_enabled=True)
    slices = [replace(gpu(n, 20), parent_uuid=whole.uuid, uuid=f"MIG-{n}") for n in (1, 2)]
    see = fields(whole, *slices, gpu(3, 24), reserved={"picky": {1: 5}}, exclusive="picky")
    assert see("other", 1, 2, 3)["vram_available_bytes"] == 24 * GIB
    assert [s.vram_available_bytes for s in see("picky", 1, 2)["devices"]] == [15 * GIB, 0]


def test_of_a_gpu_that_cannot_be_read_nothing_is_free_nor_used() -> None:
    see = fields(replace(gpu(0, 12, free_gib=9), error="GPU_IS_LOST (15)"), gpu(1, 24), reserved={"a": {0: 2}})
    found = see("a", 0, 1)
    assert (found["vram_total_bytes"], found["vram_free_bytes"], found["vram_available_bytes"]) == (36 * GIB, 24 * GIB, 24 * GIB)
    assert (found["devices"][0].vram_free_bytes, found["devices"][0].vram_used_bytes) == (None, None)
    assert see("a", 0)["vram_free_bytes"] is None


def test_the_part_of_a_pool_is_that_of_both_its_replicas_while_one_replaces_the_other() -> None:
    device = gpu(0, 24, processes=(process(1, 5), process(2, 4)))
    old, new = InstanceId("a"), InstanceId("a", "r1")
    reserved = [Reservation(old, 1, {device.uuid: 6 * GIB}), Reservation(new, 2, {device.uuid: 7 * GIB})]
    found = GpuFields(account([device], reserved, {1: old, 2: new})).of("a", (device.uuid,))
    assert (found["vram_reserved_bytes"], found["vram_used_bytes"], found["vram_available_bytes"]) == (
        13 * GIB,
        9 * GIB,
        11 * GIB,
    )
