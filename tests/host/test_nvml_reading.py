"""A scan during which the GPUs change, or a call fails, through the real binding."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pool_managerd.core.gpu.devices import NO_MEMORY_TOLD, NOT_PERMITTED
from pool_managerd.host.scan_reply import problem_of, scan_of, wants_renewal
from pool_managerd.host.simulation import TOPOLOGY_VARIABLE, simulated_environment
from tests.conftest import REPOSITORY
from tests.host.simulated import A100, MIG, MIG_UUIDS, eight_80, gpu_uuid, topology

SCAN_AND_CHANGE = """
import json, os, pathlib, sys
import pynvml
from pool_managerd.host.nvml_reading import NvmlReader

call, texts = pynvml.nvmlDeviceGetPersistenceMode, sys.argv[2:]

def changing(handle):
    file = pathlib.Path(os.environ[sys.argv[1]])
    file.with_name("scratch").write_text(texts[0])
    file.with_name("scratch").replace(file)
    if len(texts) > 1:
        texts.append(texts.pop(0))
    return call(handle)

pynvml.nvmlInit()
pynvml.nvmlDeviceGetPersistenceMode = changing
told = []
scan = NvmlReader(pynvml, lambda handle, uuid, pci: told.append(uuid)).scan()
print(json.dumps([scan and scan["devices"], told]))
"""
SCAN_AND_FAIL = """
import json, sys
import pynvml
from pool_managerd.host.nvml_worker import Output, Worker

name, code, times = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
call, worker = getattr(pynvml, name), Worker(Output(2))

def failing(*args):
    global times
    if sys.argv[4:] and pynvml.nvmlDeviceGetUUID(args[0]) != sys.argv[4]:
        return call(*args)
    times -= 1
    if times >= 0 and code == 13:
        raise pynvml.NVMLLibraryMismatchError("an older driver")
    if times >= 0 and code < 0:
        raise RuntimeError("not foreseen")
    if times >= 0 and code == 0:
        return pynvml.c_nvmlMemory_v2_t()
    if times >= 0:
        raise pynvml.NVMLError(code)
    return call(*args)

sound = worker.answer()
setattr(pynvml, name, failing)
failed = worker.answer()
setattr(pynvml, name, call)
print(json.dumps([sound, failed, worker.answer()]))
"""
WITHOUT_ONE = eight_80() + "fault gpu=3 gone\n"
BACKWARDS = (7, 6, 5, 4, 3, 2, 1, 0)
ONE_INSTANCE = "".join(MIG.splitlines(keepends=True)[:-1])
BUSY_MIG = MIG + f"process mig={MIG_UUIDS[0]} pid=4194303 vram=2GiB\n"


IDENTITY = ("nvmlDeviceGetHandleByIndex", "nvmlDeviceGetUUID", "nvmlDeviceGetPciInfo")
DECISIVE = (
    "nvmlDeviceGetMigMode", "nvmlDeviceGetMaxMigDeviceCount", "nvmlDeviceGetMigDeviceHandleByIndex",
    "nvmlDeviceGetComputeRunningProcesses", "nvmlDeviceGetGraphicsRunningProcesses", "nvmlDeviceGetMemoryInfo",
)  # fmt: skip
NOT_SUPPORTED, NO_PERMISSION, DRIVER_GONE, LOST, UNKNOWN = 3, 4, 9, 15, 999
FOR_EVER = 1_000_000


def run(script: str, folder: Path, driver: Path, gpus: str, *args: object) -> Any:
    """What ``script`` printed; ``gpus`` is the topology at its start."""
    variables = simulated_environment(driver, topology(folder / "gpus", gpus))
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, args)], capture_output=True, text=True, timeout=30, check=False,
        env={**os.environ, **variables, "PYTHONPATH": str(REPOSITORY / "src")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("before", "after", "left"),
    [
        (eight_80(), WITHOUT_ONE, [0, 1, 2, 4, 5, 6, 7]),
        (eight_80(), eight_80() + "fault gpu=0 gone\n", [1, 2, 3, 4, 5, 6, 7]),
        (WITHOUT_ONE, eight_80(), list(range(8))),
        (eight_80(), eight_80(BACKWARDS), list(BACKWARDS)),
    ],
    ids=["one-goes", "the-first-goes", "one-comes", "another-order"],
)
def test_gpus_that_change_while_they_are_read_are_read_again(
    tmp_path: Path, simulated_driver: Path, before: str, after: str, left: list[int]
) -> None:
    found, told = run(SCAN_AND_CHANGE, tmp_path, simulated_driver, before, TOPOLOGY_VARIABLE, after)
    assert [device.get("uuid") for device in found] == [gpu_uuid(number) for number in left]
    assert not [device["error"] for device in found if "error" in device], "none of them is lost"
    assert told == [device["uuid"] for device in found], "the events of each are asked for once a scan"


@pytest.mark.parametrize(
    ("before", "after", "left"),
    [(A100, MIG, MIG_UUIDS), (MIG, A100, ()), (ONE_INSTANCE, MIG, MIG_UUIDS), (MIG, ONE_INSTANCE, MIG_UUIDS[:1])],
    ids=["on", "off", "one-more", "one-fewer"],
)
def test_a_gpu_that_is_partitioned_while_it_is_read_is_read_again(
    tmp_path: Path, simulated_driver: Path, before: str, after: str, left: tuple[str, ...]
) -> None:
    found, told = run(SCAN_AND_CHANGE, tmp_path, simulated_driver, before, TOPOLOGY_VARIABLE, after)
    assert [device["uuid"] for device in found] == [gpu_uuid(0), *left]
    assert found[0]["mig_enabled"] == bool(left) and told == [gpu_uuid(0)]


def test_gpus_that_change_each_time_they_are_read_are_not_told_of(tmp_path: Path, simulated_driver: Path) -> None:
    found, _ = run(SCAN_AND_CHANGE, tmp_path, simulated_driver, MIG, TOPOLOGY_VARIABLE, A100, MIG)
    assert found is None, "an instance that somebody is just making anew is not gone"
    reply = {"ok": False, "changing": True}
    assert problem_of(reply).code == "nvml_error" and not wants_renewal(reply)


@pytest.mark.parametrize("call", [*IDENTITY, *DECISIVE])
def test_one_call_that_fails_once_changes_nothing(tmp_path: Path, simulated_driver: Path, call: str) -> None:
    sound, failed, _ = run(SCAN_AND_FAIL, tmp_path, simulated_driver, BUSY_MIG, call, UNKNOWN, 1)
    assert failed == sound and len(sound["scan"]["devices"]) == 3


@pytest.mark.parametrize("call", DECISIVE)
def test_what_engines_depend_on_is_never_guessed_when_a_call_goes_on_failing(
    tmp_path: Path, simulated_driver: Path, call: str
) -> None:
    sound, failed, after = run(SCAN_AND_FAIL, tmp_path, simulated_driver, BUSY_MIG, call, UNKNOWN, FOR_EVER)
    before = scan_of(sound, 1.0, ()).devices
    now = scan_of(failed, 2.0, before).devices
    unreadable = [d.uuid for d in now if not d.readable]
    assert unreadable == (list(MIG_UUIDS) if "Processes" in call else [gpu_uuid(0), *MIG_UUIDS])
    unknown = {"unreadable": "UNKNOWN (999)", "temperature_c": None, "power_watts": None, "utilization_percent": None}
    assert now == tuple(replace(d, **unknown) if d.uuid in unreadable else d for d in before)  # type: ignore[arg-type]
    assert not any(d.usable for d in now)
    assert scan_of(after, 3.0, now).devices == before


def test_a_gpu_about_which_a_call_fails_takes_no_other_with_it(tmp_path: Path, simulated_driver: Path) -> None:
    failing = ("nvmlDeviceGetComputeRunningProcesses", UNKNOWN, FOR_EVER, gpu_uuid(3))
    sound, failed, _ = run(SCAN_AND_FAIL, tmp_path, simulated_driver, eight_80(), *failing)
    before = scan_of(sound, 1.0, ()).devices
    now = scan_of(failed, 2.0, before).devices
    assert [d.usable for d in now] == [d.id != 3 for d in before] and now[3].error is None
    assert not wants_renewal(failed)


@pytest.mark.parametrize("call", ["nvmlDeviceGetMemoryInfo", "nvmlDeviceGetCount"])
def test_a_driver_that_goes_while_gpus_are_read_is_no_matter_of_one_gpu(
    tmp_path: Path, simulated_driver: Path, call: str
) -> None:
    _, failed, _ = run(SCAN_AND_FAIL, tmp_path, simulated_driver, A100, call, DRIVER_GONE, FOR_EVER)
    assert "scan" not in failed and problem_of(failed).code == "no_driver"


@pytest.mark.parametrize(("code", "name"), [(10, "TIMEOUT (10)"), (20, "MEMORY (20)"), (UNKNOWN, "UNKNOWN (999)")])
@pytest.mark.parametrize("call", ["nvmlDeviceGetHandleByIndex", "nvmlDeviceGetUUID"])
def test_a_gpu_that_answers_with_some_error_again_and_again_is_unreadable_and_not_lost(
    tmp_path: Path, simulated_driver: Path, call: str, code: int, name: str
) -> None:
    before, failed, _ = run(SCAN_AND_FAIL, tmp_path, simulated_driver, A100, call, code, FOR_EVER)
    (device,) = scan_of(failed, 1.0, scan_of(before, 0.0, ()).devices).devices
    assert (device.uuid, device.error, device.unreadable) == (gpu_uuid(0), None, name)


@pytest.mark.parametrize(("code", "name"), [(LOST, "GPU_IS_LOST (15)"), (16, "RESET_REQUIRED (16)")])
def test_only_lost_and_needs_a_reset_mean_a_lost_gpu(tmp_path: Path, simulated_driver: Path, code: int, name: str) -> None:
    _, failed, _ = run(SCAN_AND_FAIL, tmp_path, simulated_driver, A100, "nvmlDeviceGetHandleByIndex", code, FOR_EVER)
    assert failed["scan"]["devices"] == [{"id": 0, "error": name}]


def test_a_gpu_that_this_user_may_not_open_is_said_to_be_so_and_asked_once(tmp_path: Path, simulated_driver: Path) -> None:
    args = ("nvmlDeviceGetUUID", NO_PERMISSION, FOR_EVER)
    _, failed, _ = run(SCAN_AND_FAIL, tmp_path, simulated_driver, A100, *args)
    (device,) = scan_of(failed, 0.0, ()).devices
    assert (device.error, device.unreadable) == (None, NOT_PERMITTED) and not device.usable


def test_a_gpu_that_is_on_no_bus_is_as_good_as_any(tmp_path: Path, simulated_driver: Path) -> None:
    args = ("nvmlDeviceGetPciInfo", NOT_SUPPORTED, FOR_EVER)
    _, inside, _ = run(SCAN_AND_FAIL, tmp_path, simulated_driver, A100, *args)
    (device,) = scan_of(inside, 0.0, ()).devices
    assert device.usable and device.pci_bus_id == "" and device.vram_total_bytes > 0


def test_a_gpu_that_is_lost_while_its_instances_are_read_is_lost_with_them(tmp_path: Path, simulated_driver: Path) -> None:
    call = "nvmlDeviceGetMigDeviceHandleByIndex"
    _, failed, _ = run(SCAN_AND_FAIL, tmp_path, simulated_driver, MIG, call, LOST, FOR_EVER)
    (device,) = failed["scan"]["devices"]
    assert (device["uuid"], device["error"]) == (gpu_uuid(0), "GPU_IS_LOST (15)")


@pytest.mark.parametrize("code", [NO_PERMISSION, 0])
def test_memory_that_is_not_told_is_unknown_and_not_zero(tmp_path: Path, simulated_driver: Path, code: int) -> None:
    """``code`` 0: the driver answers with success and no bytes."""
    _, told, _ = run(SCAN_AND_FAIL, tmp_path, simulated_driver, A100, "nvmlDeviceGetMemoryInfo", code, FOR_EVER)
    (device,) = scan_of(told, 0.0, ()).devices
    assert device.unreadable == NO_MEMORY_TOLD and not device.usable and device.error is None


@pytest.mark.parametrize("call", ["nvmlDeviceGetMigMode", "nvmlDeviceGetComputeRunningProcesses"])
def test_what_a_driver_does_not_know_is_no_failure(tmp_path: Path, simulated_driver: Path, call: str) -> None:
    _, refused, _ = run(SCAN_AND_FAIL, tmp_path, simulated_driver, A100, call, NOT_SUPPORTED, FOR_EVER)
    (device,) = refused["scan"]["devices"]
    assert "error" not in device and not device["mig_enabled"] and device["processes"] == []


@pytest.mark.parametrize("call", ["nvmlDeviceGetComputeRunningProcesses", "nvmlDeviceGetMemoryInfo", "nvmlDeviceGetMigMode"])
def test_a_driver_without_the_newest_functions_is_read_with_what_it_has(
    tmp_path: Path, simulated_driver: Path, call: str
) -> None:
    _, old, _ = run(SCAN_AND_FAIL, tmp_path, simulated_driver, A100, call, 13, FOR_EVER)
    assert old["ok"] and "error" not in old["scan"]["devices"][0]


def test_what_nobody_foresaw_is_one_clean_line(tmp_path: Path, simulated_driver: Path) -> None:
    _, failed, again = run(SCAN_AND_FAIL, tmp_path, simulated_driver, A100, "nvmlDeviceGetMigMode", -1, FOR_EVER)
    problem = problem_of(failed)
    assert problem.message == "this NVIDIA driver cannot be asked: RuntimeError: not foreseen" and again["ok"]
