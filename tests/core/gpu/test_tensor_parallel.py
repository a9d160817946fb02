"""Engines that divide every layer among GPUs and take a fraction of each."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pool_managerd.core.gpu.accounts import account
from pool_managerd.core.gpu.allocation import Allocation, AllocationRequest, Split, allocate
from pool_managerd.core.gpu.devices import DeviceSnapshot
from pool_managerd.core.gpu.ledger import Ledger
from pool_managerd.core.gpu.tensor_parallel import configured_split
from pool_managerd.core.instance_id import InstanceId
from pool_managerd.core.memory.estimate import DeviceFraction
from pool_managerd.core.memory.estimator import LaunchEstimator, LaunchInputs
from pool_managerd.core.memory.measurements import Measurements
from pool_managerd.core.memory.model_shape import ModelShape
from pool_managerd.errors import NodeError, SpecError
from tests.core.gpus import GIB, gpu, mig, process

SHAPE = ModelShape("llama", 16 * GIB, n_layers=32, n_heads=32, kv_heads=(8,) * 32, key_length=128, value_length=128)
TWO = (gpu(0, 24), gpu(1, 12))
FOUR = tuple(gpu(number, 24) for number in range(4))


def inputs(shape: ModelShape | None = SHAPE, fraction: float = 0.9, gpus: int | None = None) -> LaunchInputs:
    return LaunchInputs("vllm-1", "m", DeviceFraction(fraction, 8192, gpus=gpus), shape, 16 * GIB, GIB // 2)


def place(
    needed: LaunchInputs, devices: tuple[DeviceSnapshot, ...], split: Split = None, *, masked: bool = False, enforce: bool = True
) -> Allocation:
    wanted = AllocationRequest(InstanceId("p"), 1, devices, devices if masked else None, split, enforce=enforce)
    return allocate(LaunchEstimator(needed, Measurements()), wanted, Ledger(), account(devices, [], {}))


def test_each_gpu_is_reserved_the_fraction_that_the_engine_takes() -> None:
    found = place(inputs(), (gpu(0, 24),))
    assert found.bytes_by_device == {"GPU-00000000": int(24 * GIB * 0.9)}
    shared = place(inputs(), FOUR[:2], "auto", masked=True)
    assert shared.shares == (0.5, 0.5) and set(shared.bytes_by_device.values()) == {int(24 * GIB * 0.9)}


def test_the_smallest_gpu_decides_whether_an_equal_part_fits() -> None:
    assert place(inputs(), TWO, "auto", masked=True).bytes_by_device["GPU-00000001"] == int(12 * GIB * 0.9)
    with pytest.raises(NodeError, match=r"GPU 1 needs 13 GiB and has 10\.8 GiB for it") as caught:
        place(inputs(replace(SHAPE, weights_bytes=24 * GIB)), TWO, "auto", masked=True)
    assert caught.value.code == "INSUFFICIENT_VRAM"


def test_what_others_hold_is_not_taken() -> None:
    busy = (gpu(0, 24, processes=(process(9, 6),)),)
    with pytest.raises(NodeError, match=r"needs 21\.6 GiB on GPU 0"):
        place(inputs(), busy)
    assert place(inputs(fraction=0.75), busy).bytes_by_device == {"GPU-00000000": 18 * GIB}


def test_a_model_larger_than_the_fraction_is_refused_before_it_is_started() -> None:
    with pytest.raises(NodeError, match=r"cannot put the model on one GPU: GPU 0 needs 17\.5 GiB and has 12 GiB for it"):
        place(inputs(fraction=0.5), (gpu(0, 24),))


def test_as_many_gpus_are_used_as_the_heads_can_be_divided_among() -> None:
    big = replace(SHAPE, weights_bytes=50 * GIB)
    assert len(place(inputs(big), FOUR, "auto").devices) == 4, "three would hold it, and 32 heads are no multiple of three"
    with pytest.raises(SpecError, match="32 attention heads among 3 GPUs") as odd:
        place(inputs(big), FOUR[:3], "auto", masked=True)
    assert odd.value.hint == "use a number of GPUs that divides it"
    assert len(place(inputs(replace(big, n_heads=None)), FOUR, "auto").devices) == 3, "what the header does not tell"


def test_a_division_that_such_an_engine_cannot_do_is_refused() -> None:
    with pytest.raises(SpecError, match="divides equally"):
        place(inputs(), TWO, (0.7, 0.3), masked=True)
    assert place(inputs(), FOUR[:2], (1.0, 1.0), masked=True).shares == (0.5, 0.5)
    with pytest.raises(SpecError, match="uses the first alone") as first:
        place(inputs(), TWO, masked=True)
    assert first.value.hint == "set `tensor_split: auto` to divide the model among them, or name one device"
    parent = gpu(0, 80, mig_enabled=True)
    with pytest.raises(SpecError, match="MIG"):
        place(inputs(), (mig(parent, 1, 40), mig(parent, 2, 40)), "auto", masked=True)


def test_without_enforcement_it_is_reserved_what_is_left() -> None:
    found = place(inputs(), (gpu(0, 24, processes=(process(9, 6),)),), enforce=False)
    assert found.bytes_by_device == {"GPU-00000000": 18 * GIB} and found.notices


def test_an_engine_that_was_told_how_many_gpus_to_use_gets_as_many() -> None:
    assert configured_split(inputs(gpus=2)) == (0.5, 0.5) and configured_split(inputs(gpus=1)) is None is configured_split(
        inputs()
    )
    assert len(place(inputs(gpus=2), FOUR, configured_split(inputs(gpus=2))).devices) == 2
    sees_two = place(inputs(gpus=1), FOUR[:2], masked=True)
    assert len(sees_two.devices) == 2, "it runs as it was submitted, and takes memory of the first alone"
    assert list(sees_two.bytes_by_device.values()) == [int(24 * GIB * 0.9), 0]
    with pytest.raises(SpecError, match="over 3 GPUs: its device mask has 2"):
        place(inputs(gpus=3), FOUR[:2], masked=True)


def test_the_operators_own_number_is_what_it_is_told_to_take_and_must_hold_the_model() -> None:
    own = replace(inputs(), configured_bytes=40 * GIB)
    assert set(place(own, FOUR[:2], "auto", masked=True).bytes_by_device.values()) == {20 * GIB}
    with pytest.raises(NodeError, match=r"needs 17\.5 GiB and has 8 GiB for it"):
        place(replace(own, configured_bytes=8 * GIB), (gpu(0, 24),))


def test_a_model_that_cannot_be_read_is_counted_by_its_file() -> None:
    found = place(inputs(shape=None), (gpu(0, 24),))
    assert found.bytes_by_device == {"GPU-00000000": int(24 * GIB * 0.9)}


@given(
    st.lists(st.integers(4, 96), min_size=1, max_size=8), st.integers(1, 200), st.floats(0.1, 1.0),
    st.sampled_from(["auto", None]),
)  # fmt: skip
def test_no_gpu_is_reserved_more_than_it_has_or_less_than_its_part(
    sizes: list[int], weights: int, fraction: float, split: Split
) -> None:
    devices = tuple(gpu(number, size) for number, size in enumerate(sizes))
    needed = inputs(replace(SHAPE, weights_bytes=weights * GIB), fraction)
    try:
        found = place(needed, devices, split)
    except NodeError:
        return
    assert 32 % len(found.devices) == 0
    for device in found.devices:
        part = found.bytes_by_device[device.uuid]
        assert weights * GIB // len(found.devices) < part <= device.vram_total_bytes
