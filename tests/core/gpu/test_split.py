"""Sharing a model among unequal GPUs: the shares fit, follow the room, and a refusal shows what came closest."""

from __future__ import annotations

from itertools import permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pool_managerd.core.gpu.devices import DeviceSnapshot
from pool_managerd.core.gpu.split import OVERHEAD_BYTES, SplitPlan
from pool_managerd.errors import NodeError, SpecError
from tests.core.gpus import GIB, MIB, gpu, mig

SMALL, LARGE = gpu(1, 12), gpu(0, 24)


def test_shares_follow_usable_memory_in_pci_order() -> None:
    plan = SplitPlan.compute([SMALL, LARGE], 18 * GIB)
    assert plan.devices == (LARGE, SMALL)
    assert plan.ratios() == pytest.approx((23.5 / 35, 11.5 / 35))
    assert plan.tensor_split_flag() == "0.671429,0.328571"
    assert sum(plan.shares_bytes) == pytest.approx(18 * GIB + 2 * OVERHEAD_BYTES, abs=2)
    plan.validate()
    assert (plan.kv_bytes, plan.overhead_bytes) == (0, OVERHEAD_BYTES)
    with pytest.raises(NodeError) as full:
        SplitPlan.compute([gpu(0, free_gib=0)], GIB)
    assert full.value.details["free_bytes"] == 0 and full.value.message.endswith("that is 1.5 GiB too much")


def test_given_ratios_belong_to_the_devices_as_given_and_need_not_sum_to_one() -> None:
    plan = SplitPlan.compute([SMALL, LARGE], 8 * GIB, ratios=(1, 3))
    assert plan.ratios() == (0.75, 0.25)


def test_a_model_that_fits_to_the_last_byte_fits() -> None:
    room = (24 * GIB - OVERHEAD_BYTES) + (12 * GIB - OVERHEAD_BYTES)
    assert SplitPlan.compute([LARGE, SMALL], room).shortfall_bytes == 0
    with pytest.raises(NodeError):
        SplitPlan.compute([LARGE, SMALL], room + 64)


def test_the_smallest_gpu_refuses_a_share_that_it_cannot_hold_and_the_plan_that_fits_is_named() -> None:
    with pytest.raises(NodeError) as caught:
        SplitPlan.compute([LARGE, SMALL], 20 * GIB, kv_bytes=6 * GIB, ratios=(1, 1))
    error = caught.value
    assert error.code == "INSUFFICIENT_VRAM"
    assert error.message == (
        "cannot divide the model among 2 GPUs: GPU 1 needs 13.5 GiB and has 12 GiB for it,"
        " GPU 0 needs 13.5 GiB and has 24 GiB for it; it would fit with 67.1% on GPU 0, 32.9% on GPU 1"
    )
    assert error.hint == "set `tensor_split: [0.6714, 0.3286]`"
    with pytest.raises(NodeError) as other:
        SplitPlan.compute([SMALL, LARGE], 20 * GIB, kv_bytes=6 * GIB, ratios=(1, 1))
    assert other.value.hint == "set `tensor_split: [0.3286, 0.6714]`", "in the order of the mask, as it is written"
    assert error.details["closest"]["shortfall_bytes"] == 0
    assert [row["free_bytes"] for row in error.details["devices"]] == [24 * GIB, 12 * GIB]


def test_what_fits_nowhere_names_what_came_closest() -> None:
    with pytest.raises(NodeError) as caught:
        SplitPlan.compute([LARGE, SMALL], 70 * GIB)
    assert "67.1% on GPU 0, 32.9% on GPU 1 came closest" in caught.value.message
    assert caught.value.details["closest"]["ratios"] == pytest.approx([23.5 / 35, 11.5 / 35])
    assert caught.value.details["needed_bytes"] > caught.value.details["free_bytes"]


def test_the_cache_of_each_gpu_is_capped_by_the_tightest_one() -> None:
    fits = SplitPlan.compute([LARGE, SMALL], 10 * GIB, kv_bytes=4 * GIB, ratios=(1, 1))
    assert fits.kv_bytes_per_device == (2 * GIB, 2 * GIB)
    assert fits.max_kv_bytes == 2 * (12 * GIB - OVERHEAD_BYTES - 5 * GIB)
    greedy = SplitPlan(fits.devices, fits.shares, fits.free_bytes, fits.model_bytes, 100 * GIB)
    assert greedy.kv_bytes_per_device == (fits.max_kv_bytes // 2,) * 2


def test_what_others_hold_is_taken_off_when_told() -> None:
    with pytest.raises(NodeError, match="GPU 0 needs"):
        SplitPlan.compute([LARGE, SMALL], 18 * GIB, ratios=(2, 1), free={LARGE.uuid: 6 * GIB})


def test_tensor_parallel_carries_what_the_smallest_can() -> None:
    assert SplitPlan.equal([SMALL, LARGE], 20 * GIB).ratios() == (0.5, 0.5)
    with pytest.raises(NodeError, match="GPU 1 needs 13"):
        SplitPlan.equal([SMALL, LARGE], 25 * GIB)


@pytest.mark.parametrize(
    ("ratios", "why"),
    [
        ((1.0,), "1 ratios for 2 GPUs"),
        ((1.0, 2.0, 3.0), "3 ratios for 2 GPUs"),
        ((1.0, -1.0), "-1.0 is no ratio"),
        ((1.0, float("nan")), "nan is no ratio"),
        ((1.0, float("inf")), "inf is no ratio"),
        ((True, 1.0), "True is no ratio"),
        ((1.0, 0.0), "would carry nothing"),
        ((1e300, 1e-300), "too small beside the others"),
    ],
)
def test_ratios_that_make_no_sense_are_the_authors_error(ratios: tuple[float, ...], why: str) -> None:
    with pytest.raises(SpecError, match=why):
        SplitPlan.compute([LARGE, SMALL], GIB, ratios=ratios)


def test_devices_that_cannot_share_are_refused() -> None:
    parent = gpu(2, 40, mig_enabled=True)
    for devices, why, hint in (
        ([], "no GPU to use", "name the pool's `devices`"),
        ([LARGE, LARGE], "named twice", "name each device once"),
        ([mig(parent, 1), mig(parent, 2)], "MIG instances cannot share", "give the pool one MIG instance, or whole GPUs"),
        ([LARGE, mig(parent, 1)], "MIG instances cannot share", "give the pool one MIG instance, or whole GPUs"),
        ([LARGE, parent], "is in MIG mode", "use another GPU, or one of its MIG instances"),
    ):
        with pytest.raises(SpecError, match=why) as refused:
            SplitPlan.compute(devices, GIB)
        assert refused.value.hint == hint
    with pytest.raises(NodeError, match="cannot be read: GPU is lost"):
        SplitPlan.compute([LARGE, gpu(1, error="GPU is lost")], GIB)
    assert SplitPlan.compute([mig(parent, 1)], GIB).ratios() == (1.0,)


def test_sizes_below_zero_are_refused() -> None:
    with pytest.raises(SpecError, match="a size is negative"):
        SplitPlan.compute([LARGE], GIB, kv_bytes=-1)


@pytest.mark.parametrize(
    ("ratios", "hint"),
    [((1,), "write one ratio per device of the pool"), ((1, -1), "use positive numbers"),
     ((1, float("nan")), "use positive numbers"), ((True, 1), "use positive numbers"),
     ((1, 0), "remove that GPU from `devices`, or give it a ratio above 0"),
     ((2, 5e-324), "use numbers of like size")],
)  # fmt: skip
def test_ratios_that_cannot_be_are_refused_with_what_to_write(ratios: tuple[float, ...], hint: str) -> None:
    with pytest.raises(SpecError, match=r"^cannot divide the model among the GPUs: ") as caught:
        SplitPlan.compute([LARGE, SMALL], GIB, ratios=ratios)
    assert caught.value.hint == hint


def test_a_gpu_that_cannot_be_read_carries_nothing_and_the_machine_is_at_fault() -> None:
    with pytest.raises(NodeError, match=r"GPU 1 cannot be read: UNKNOWN \(999\)") as caught:
        SplitPlan.compute([LARGE, gpu(1, unreadable="UNKNOWN (999)")], GIB)
    assert caught.value.hint == "use another GPU"


fleets = st.lists(st.integers(1, 96), min_size=1, max_size=8).map(
    lambda sizes: [gpu(number, size) for number, size in enumerate(sizes)]
)


@given(devices=fleets, model=st.integers(0, 600 * GIB), kv=st.integers(0, 64 * GIB))
def test_an_answer_fits_and_sums_to_one_and_a_refusal_is_true(devices: list[DeviceSnapshot], model: int, kv: int) -> None:
    room = sum(max(0, d.vram_free_bytes - OVERHEAD_BYTES) for d in devices)
    try:
        plan = SplitPlan.compute(devices, model, kv_bytes=kv)
    except NodeError:
        assert model + kv > room
        return
    assert model + kv <= room + len(devices)
    assert sum(plan.ratios()) == pytest.approx(1.0, abs=1e-6)
    assert all(ratio > 0 for ratio in plan.ratios())
    assert all(need <= free for need, free in zip(plan.shares_bytes, plan.free_bytes, strict=True))
    assert sum(plan.kv_bytes_per_device) == pytest.approx(kv, abs=len(devices))


@given(devices=fleets, model=st.integers(0, 100 * GIB), more=st.integers(1, 8 * GIB), data=st.data())
def test_room_only_helps_and_order_does_not_matter(
    devices: list[DeviceSnapshot], model: int, more: int, data: st.DataObject
) -> None:
    ratios = data.draw(st.lists(st.floats(0.01, 10), min_size=len(devices), max_size=len(devices)))
    try:
        plan = SplitPlan.compute(devices, model, ratios=ratios)
    except NodeError:
        return
    roomier = {d.uuid: d.vram_free_bytes + more for d in devices}
    assert SplitPlan.compute(devices, model, ratios=ratios, free=roomier).ratios() == plan.ratios()
    paired = data.draw(st.permutations(list(zip(devices, ratios, strict=True))))
    again = SplitPlan.compute([d for d, _ in paired], model, ratios=[r for _, r in paired])
    assert again.devices == plan.devices
    assert again.ratios() == pytest.approx(plan.ratios(), rel=1e-12)


def test_every_order_of_the_devices_gives_the_same_plan() -> None:
    devices = [gpu(0, 24), gpu(1, 12), gpu(2, 16, free_gib=3)]
    plans = {SplitPlan.compute(order, 20 * GIB + MIB).tensor_split_flag() for order in permutations(devices)}
    assert len(plans) == 1
