"""One device as machines are told of it."""

from __future__ import annotations

from dataclasses import replace

from pool_managerd.core.gpu.accounts import Reservation, account
from pool_managerd.core.gpu.health import GpuHealth
from pool_managerd.core.instance_id import InstanceId
from pool_managerd.supervision.gpu.registry_fields import exclusive_gpus
from pool_managerd.supervision.gpu.view import device_row
from tests.core.gpus import GIB, gpu, mig, process


def test_what_cannot_be_read_is_not_known_and_the_device_says_why() -> None:
    device = replace(gpu(0, 24, processes=(process(7, 3),)), unreadable="UNKNOWN (999)")
    reserved = [Reservation(InstanceId("a"), 1, {device.uuid: 5 * GIB})]
    accounts = account([device], reserved, {7: InstanceId("a")})
    row = device_row(device, GpuHealth(device.uuid, "0", unreadable=device.unreadable), accounts[device.uuid], {})
    assert (row["readable"], row["vram_free_bytes"], row["vram_used_bytes"], row["vram_available_bytes"]) == (
        False,
        None,
        None,
        0,
    )
    assert [(r["reserved_bytes"], r["used_bytes"]) for r in row["reservations"]] == [(5 * GIB, None)]
    assert row["reason"] == "it cannot be read: UNKNOWN (999)" and row["remedy"] and row["vram_total_bytes"] == 24 * GIB


def test_what_an_exclusive_pool_leaves_over_is_offered_to_nobody_and_says_for_whom_it_is_kept() -> None:
    whole = replace(gpu(0, 80), mig_enabled=True)
    devices = [whole, mig(whole, 1), mig(whole, 2), gpu(1)]
    accounts = account(devices, [Reservation(InstanceId("picky"), 1, {devices[1].uuid: GIB}, exclusive=True)], {})
    kept = exclusive_gpus(accounts.values())
    rows = [device_row(d, GpuHealth(d.uuid, d.label), accounts[d.uuid], kept) for d in devices]
    assert [row["kept_for"] for row in rows] == ["picky", "picky", "picky", None]
    assert [row["vram_available_bytes"] for row in rows] == [0, 0, 0, 24 * GIB]
