"""Series of the GPUs: what the devices say now, and nothing of a device that is gone."""

from __future__ import annotations

from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from pool_managerd.telemetry import series
from pool_managerd.telemetry.metrics import Metrics
from tests.api.fake_devices import MIB, UUID_0, UUID_1, busy_device, device, devices, gone_device, lost_device
from tests.telemetry.test_metrics import event, samples, status

Key = tuple[str, tuple[tuple[str, str], ...]]
POOL = {"engine": "llamacpp", "engine_version": "b1", "replica_id": "r0"}


def on(device: str, series_name: str, /, **labels: str) -> Key:
    return series_name, tuple(sorted({"device": device, **labels}.items()))


def attached(answer: dict[str, Any], *statuses: dict[str, Any]) -> Metrics:
    metrics = Metrics()
    metrics.attach(lambda: list(statuses), lambda: answer)
    return metrics


def test_a_device_shows_its_memory_its_promises_and_its_health() -> None:
    found = samples(attached(devices(busy_device(state="quarantined"), device(1))))
    assert found[on("0", "vram_total_bytes")] == 24_564 * MIB
    assert found[on("0", "vram_free_bytes")] == 14_848 * MIB
    assert found[on("0", "vram_reserved_bytes")] == 14_336 * MIB
    assert found[on("1", "vram_reserved_bytes")] == 0
    assert found[on("0", "gpu_temperature_celsius")] == 61
    assert found[on("0", "gpu_power_watts")] == 287.4
    assert found[on("0", "gpu_ecc_uncorrected")] == 0
    assert [found[on(d, "device_quarantined")] for d in ("0", "1")] == [1, 0]
    info = {"uuid": UUID_0, "name": "NVIDIA GeForce RTX 4090", "pci_bus_id": "00000000:01:00.0"}
    assert found[on("0", "gpu_info", **info)] == 1


def test_what_the_driver_does_not_tell_has_no_sample() -> None:
    found = samples(attached(devices(device(0, temperature_c=None, power_watts=None), ram_available_bytes=None)))
    names = {name for name, _ in found}
    assert names.isdisjoint({"gpu_temperature_celsius", "gpu_power_watts", "gpu_ecc_uncorrected", "ram_available_bytes"})
    assert "vram_total_bytes" in names


def test_a_pool_shows_what_it_holds_of_each_device() -> None:
    found = samples(attached(devices(), status("demo", **POOL), status("late", engine="vllm")))
    demo = on("0", "vram_used_bytes", pool_id="demo", **POOL)
    late = on("0", "vram_used_bytes", pool_id="late", engine="vllm", engine_version="unknown", replica_id="unknown")
    assert (found[demo], found[late]) == (8_192 * MIB, 0)
    assert found[on("0", "gpu_utilization", pool_id="demo", **POOL)] == 98
    assert not [key for key in found if key[0] == "vram_used_bytes" and ("device", "1") in key[1]]


def test_use_that_was_not_measured_is_not_shown_as_zero() -> None:
    answer = devices()
    answer["devices"][0]["reservations"][0]["used_bytes"] = None
    found = samples(attached(answer, status("demo", **POOL)))
    assert on("0", "vram_used_bytes", pool_id="demo", **POOL) not in found
    assert on("0", "gpu_utilization", pool_id="demo", **POOL) in found


def test_the_node_says_how_old_its_view_is() -> None:
    problem = {"code": "nvml_hung", "message": "x", "hint": ""}
    found = samples(attached(devices(stale=True, age_ms=42_000, problem=problem)))
    assert (found["devices_stale", ()], found["device_scan_age_ms", ()]) == (1, 42_000)
    assert found["ram_available_bytes", ()] == 40_960 * MIB
    assert "device_scan_age_ms" not in {name for name, _ in samples(attached(devices(age_ms=None)))}


def test_the_memory_of_a_pools_devices_comes_from_its_status() -> None:
    found = samples(attached(devices(), status("demo", vram_total_bytes=10, vram_free_bytes=4)))
    assert found["pool_vram_total_bytes", (("pool_id", "demo"),)] == 10
    assert found["pool_vram_free_bytes", (("pool_id", "demo"),)] == 4


def test_resets_and_xids_are_counted_and_resets_show_as_zero_before_the_first() -> None:
    metrics = attached(devices())
    assert samples(metrics)[on("1", "driver_reset_total")] == 0
    metrics.on_event(event("device_reset", None, device="1"))
    for xid in (79, 79, 31):
        metrics.on_event(event("xid", None, device="0", xid=xid))
    found = samples(metrics)
    assert found[on("1", "driver_reset_total")] == 1
    assert (found[on("0", "gpu_xid_total", xid="79")], found[on("0", "gpu_xid_total", xid="31")]) == (2, 1)


def test_xid_numbers_are_bounded_whatever_arrives() -> None:
    metrics = attached(devices())
    for xid in range(500):
        metrics.on_event(event("xid", None, device="0", xid=xid))
    shown = [labels for name, labels in samples(metrics) if name == "gpu_xid_total"]
    assert len(shown) == series.LABEL_BUDGETS["xid"] + 1


def test_the_series_of_a_device_that_is_gone_are_gone() -> None:
    answer = devices()
    metrics = attached(answer, status("demo", **POOL))
    metrics.on_event(event("device_reset", None, device="0"))
    metrics.on_event(event("xid", None, device="0", xid=79))
    assert [key for key in samples(metrics) if ("device", "0") in key[1]]
    del answer["devices"][0]
    left = samples(metrics)
    assert not [key for key in left if ("device", "0") in key[1]]
    assert on("1", "vram_total_bytes") in left


def test_a_pool_that_is_gone_leaves_nothing_on_its_device() -> None:
    found = samples(attached(devices()))
    assert not [key for key in found if key[0] in ("vram_used_bytes", "gpu_utilization")]


def test_a_gpu_that_is_gone_and_one_that_has_its_index_now_do_not_clash() -> None:
    found = samples(attached(devices(device(0, uuid=UUID_1), gone_device(device=UUID_0, uuid=UUID_0))))
    assert (found[on("0", "device_quarantined")], found[on(UUID_0, "device_quarantined")]) == (0, 1)
    assert len([name for name, _ in found if name == "gpu_info"]) == 2
    assert on(UUID_0, "vram_total_bytes") not in found


def test_of_a_gpu_that_cannot_be_read_nothing_is_shown_as_if_it_were_measured() -> None:
    found = samples(attached(devices(lost_device()), status("demo", **POOL)))
    names = {name for name, _ in found}
    assert names.isdisjoint(
        {"vram_free_bytes", "gpu_temperature_celsius", "gpu_power_watts", "vram_used_bytes", "gpu_utilization"}
    )
    assert found[on("0", "device_quarantined")] == 1
    assert found[on("0", "vram_reserved_bytes")] == 10_240 * MIB


def test_without_a_source_of_devices_there_are_no_series_of_devices() -> None:
    metrics = Metrics()
    metrics.attach(lambda: [status("p")])
    names = {family.name for family in text_string_to_metric_families(metrics.render().decode())}
    assert names.isdisjoint({spec.name for spec in (*series.DEVICE_GAUGES, *series.NODE_GAUGES)})
