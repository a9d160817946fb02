"""Which GPUs one start gets, and how much of each."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pool_managerd.core.gpu.accounts import Reservation, account
from pool_managerd.core.gpu.allocation import Allocation, AllocationRequest, Split, allocate
from pool_managerd.core.gpu.devices import DeviceSnapshot
from pool_managerd.core.gpu.ledger import Ledger
from pool_managerd.core.instance_id import InstanceId
from pool_managerd.core.memory.estimate import EngineSettings, EstimatePart, MemoryEstimate
from pool_managerd.core.memory.estimator import LaunchEstimator, LaunchInputs
from pool_managerd.core.memory.measurements import Measurements
from pool_managerd.core.memory.model_shape import ModelShape
from pool_managerd.errors import NodeError, PoolError, SpecError
from tests.core.gpus import GIB, gpu, mig, process

TWO = (gpu(0, 24), gpu(1, 12))


def needs(weights_gib: float, *, overhead_gib: float = 0.5, configured_gib: float | None = None) -> LaunchEstimator:
    inputs = LaunchInputs(
        "v1", "m", EngineSettings(), None, int(weights_gib * GIB), int(overhead_gib * GIB),
        None if configured_gib is None else int(configured_gib * GIB),
    )  # fmt: skip
    return LaunchEstimator(inputs, Measurements())


def place(
    needed: LaunchEstimator, devices: tuple[DeviceSnapshot, ...], *, mask: tuple[int, ...] | None = None, split: Split = None,
    ledger: Ledger | None = None, enforce: bool = True, pool: str = "p",
) -> Allocation:  # fmt: skip
    book = ledger or Ledger()
    chosen = None if mask is None else tuple(next(d for d in devices if d.id == i) for i in mask)
    usable = tuple(d for d in devices if d.usable)
    wanted = AllocationRequest(InstanceId(pool), 1, usable, chosen, split, enforce=enforce)
    return allocate(needed, wanted, book, account(devices, book.all(), {}))


def test_a_single_gpu_is_chosen_even_when_two_would_share_it() -> None:
    found = place(needs(10), TWO)
    assert [d.id for d in found.devices] == [0] and found.shares == ()


def test_without_a_split_nothing_spills_over_to_a_second_gpu() -> None:
    with pytest.raises(NodeError, match=r"needs 30\.5 GiB on one GPU, and GPU 0 .* has 24 GiB when it is empty") as caught:
        place(needs(30), TWO)
    assert "tensor_split: auto" in str(caught.value.hint) and caught.value.retriable is False


def test_an_automatic_split_takes_as_many_gpus_as_it_must_and_shares_by_room() -> None:
    assert [d.id for d in place(needs(20), TWO, split="auto").devices] == [0]
    found = place(needs(30), TWO, split="auto")
    assert [d.id for d in found.devices] == [0, 1]
    assert sum(found.shares) == pytest.approx(1.0) and found.shares[0] > found.shares[1]
    assert all(found.bytes_by_device[d.uuid] <= d.vram_total_bytes for d in TWO)


def test_an_automatic_split_leaves_out_what_others_have_reserved_and_do_not_use_yet() -> None:
    devices, book = (gpu(0, 24), gpu(1, 24)), Ledger()
    book.reserve(Reservation(InstanceId("x"), 1, {devices[0].uuid: 12 * GIB}), account(devices, [], {}))
    found = place(needs(20), devices, mask=(0, 1), split="auto", ledger=book)
    assert found.shares == pytest.approx((11.5 / 35, 23.5 / 35))


def test_given_shares_belong_to_the_order_of_the_mask() -> None:
    found = place(needs(10), TWO, mask=(1, 0), split=(0.25, 0.75))
    assert found.shares == pytest.approx((0.75, 0.25)) and [d.id for d in found.devices] == [0, 1]


def test_an_engine_that_uses_one_of_the_gpus_it_is_shown_is_counted_on_that_one() -> None:
    inputs = LaunchInputs("v1", "m", EngineSettings(only_device=1), None, 10 * GIB, GIB // 2)
    found = place(LaunchEstimator(inputs, Measurements()), TWO, mask=(0, 1))
    assert found.bytes_by_device == {TWO[0].uuid: GIB // 2, TWO[1].uuid: 10 * GIB + GIB // 2}
    far = place(
        LaunchEstimator(LaunchInputs("v1", "m", EngineSettings(only_device=7), None, GIB), Measurements()), TWO, mask=(0, 1)
    )
    assert far.bytes_by_device[TWO[1].uuid] > GIB


def test_a_split_that_cannot_fit_is_refused_with_the_plan_that_came_closest() -> None:
    with pytest.raises(NodeError) as refused:
        place(needs(60), TWO, mask=(0, 1), split="auto")
    assert refused.value.code == "INSUFFICIENT_VRAM"


def test_nothing_is_split_over_mig_instances() -> None:
    parent = gpu(0, 80, mig_enabled=True)
    devices = (parent, mig(parent, 1), mig(parent, 2))
    with pytest.raises(PoolError):
        place(needs(15), devices, split="auto")
    wanted = AllocationRequest(InstanceId("p"), 1, devices[1:], devices[1:], "auto")
    with pytest.raises(SpecError, match="MIG"):
        allocate(needs(15), wanted, Ledger(), account(devices, [], {}))


def test_the_operators_own_number_replaces_the_estimate() -> None:
    found = place(needs(90, configured_gib=8), TWO)
    assert found.bytes_by_device == {"GPU-00000000": 8 * GIB}


def test_a_start_that_is_only_warned_about_is_reserved_what_is_left_and_no_more() -> None:
    devices = (gpu(0, 24, processes=(process(9, 20),)),)
    found = place(needs(10), devices, enforce=False)
    assert found.bytes_by_device == {"GPU-00000000": 4 * GIB} and "may not fit" in found.notices[0]


def test_several_gpus_are_only_warned_about_too() -> None:
    for split in (None, "auto", (0.5, 0.5)):
        found = place(needs(60), TWO, mask=(0, 1), split=split, enforce=False)
        assert all(found.bytes_by_device[d.uuid] <= d.vram_total_bytes for d in TWO) and found.notices
        assert found.shares == pytest.approx((0.5, 0.5) if split == (0.5, 0.5) else (2 / 3, 1 / 3))


def test_the_refusal_speaks_of_the_gpu_that_came_closest() -> None:
    devices = (gpu(0, 24, processes=(process(9, 20),)), gpu(1, 24, processes=(process(8, 10),)), gpu(2, 12))
    with pytest.raises(NodeError, match=r"needs 15 GiB on GPU 1 .*14 GiB of 24 GiB"):
        place(needs(14.5), devices)


def test_without_a_gpu_to_use_the_start_says_how_many_it_needs() -> None:
    with pytest.raises(NodeError, match=r"^cannot start pool p: it needs 1 usable GPU, and 0 can be used now$") as caught:
        place(needs(1), ())
    error = caught.value
    assert (error.code, error.status, error.pool_id) == ("GPU_UNAVAILABLE", 503, "p")
    assert error.hint == "pool-managerd devices shows why"
    with pytest.raises(NodeError, match="it needs 3 usable GPUs, and 2 can be used now"):
        place(needs(1), TWO, split=(1.0, 1.0, 1.0))


def test_an_engine_is_shown_its_devices_alone_by_uuid() -> None:
    found = place(needs(10), TWO, mask=(1, 0), split=(1.0, 1.0))
    assert found.environment() == {
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": "GPU-00000000,GPU-00000001",
    }  # fmt: skip


def test_what_is_reserved_for_a_start_that_is_only_warned_about_is_its_launchs_own() -> None:
    book, devices = Ledger(), (gpu(0, 24, processes=(process(9, 20),)),)
    found = place(needs(10), devices, ledger=book, enforce=False)
    assert book.all() == [Reservation(InstanceId("p"), 1, {"GPU-00000000": 4 * GIB})]
    assert found.notices == (
        "Started although it may not fit (gpu.fit is not enforce): it needs 10.5 GiB on GPU 0 (NVIDIA Test), where 4 GiB of"
        " 24 GiB may still be reserved; the rest is held by pid 9 (python) 20 GiB",
    )


def test_an_exclusive_neighbour_is_no_matter_of_room() -> None:
    book = Ledger()
    book.reserve(Reservation(InstanceId("x"), 1, {TWO[0].uuid: GIB}, exclusive=True), account(TWO, [], {}))
    with pytest.raises(NodeError, match=r"needs 14\.5 GiB on one GPU, and GPU 1") as caught:
        place(needs(14), TWO, ledger=book)
    assert caught.value.code == "INSUFFICIENT_VRAM", "the GPU that lacks a known amount is nearer"
    with pytest.raises(NodeError, match="exclusive there"):
        place(needs(1), TWO, mask=(0,), ledger=book, enforce=False)


def test_what_other_pools_must_have_is_taken_last() -> None:
    devices = (gpu(0, 24), gpu(1, 20))
    wanted = AllocationRequest(InstanceId("p"), 1, devices, reserved_by_masks=frozenset({devices[0].uuid}))
    found = allocate(needs(10), wanted, Ledger(), account(devices, [], {}))
    assert [d.id for d in found.devices] == [1]


def test_an_engine_that_uses_one_gpu_alone_is_told_the_whole_share_of_it() -> None:
    launch = LaunchEstimator(LaunchInputs("v1", "m", EngineSettings(only_device=1), None, 10 * GIB, GIB // 2), Measurements())
    assert place(launch, TWO, mask=(0, 1)).shares == (0.0, 1.0)


def test_every_single_gpu_is_tried_however_many_there_are() -> None:
    parents = [gpu(number, 80, mig_enabled=True) for number in range(8)]
    instances = [mig(parent, number) for parent in parents for number in range(7)]
    book = Ledger()
    for parent in parents[:6]:
        first = next(d for d in instances if d.parent_uuid == parent.uuid)
        book.reserve(
            Reservation(InstanceId(f"on-{parent.id}"), 1, {first.uuid: GIB}, exclusive=True),
            account([*parents, *instances], book.all(), {}),
        )
    found = place(needs(4), (*parents, *instances), ledger=book)
    assert found.devices[0].parent_uuid == parents[6].uuid, "the first six GPUs are exclusive"


def test_the_engine_is_told_the_shares_that_were_reserved_with_and_without_a_split() -> None:
    busy = (gpu(0, 24, processes=(process(9, 12),)), gpu(1, 24))
    for split in (None, "auto"):
        found = place(needs(20), busy, mask=(0, 1), split=split)
        assert found.shares[0] < 0.4 and sum(found.shares) == pytest.approx(1.0)


def test_launches_that_differ_in_what_decides_memory_are_not_alike() -> None:
    shape = None

    def key(settings: EngineSettings) -> object:
        return LaunchEstimator(LaunchInputs("v", "m", settings, shape), Measurements()).key()

    assert key(EngineSettings(gpu_layers=4)) != key(EngineSettings())
    assert key(EngineSettings(cache_type_k="q4_0")) != key(EngineSettings())
    assert key(EngineSettings(ctx=512)) == key(EngineSettings(ctx=512))


def test_what_a_like_launch_was_measured_to_hold_is_reserved() -> None:
    known = Measurements()
    first = LaunchEstimator(needs(10).inputs, known)
    known.observe(first.key(gpu="NVIDIA Test"), [3 * GIB], loaded=True)
    assert place(first, TWO).bytes_by_device["GPU-00000000"] < 4 * GIB


def test_an_engine_of_unknown_shape_is_sized_by_its_header() -> None:
    shape = ModelShape("llama", 4 * GIB, n_layers=2, n_embd=64, kv_heads=(2, 2), key_length=32, value_length=32)
    exact = LaunchEstimator(LaunchInputs("v", "m", EngineSettings(ctx=1024), shape, 4 * GIB, 0), Measurements()).estimate(1)
    assert exact.weights.size_bytes == 4 * GIB and exact.kv.size_bytes > 0


@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.floats(0, 40), st.booleans()), max_size=12))
def test_reservations_never_exceed_what_there_is_whatever_is_asked(asked: list[tuple[str, float, bool]]) -> None:
    ledger = Ledger()
    for pool, gib, auto in asked:
        try:
            place(needs(gib), TWO, split="auto" if auto else None, ledger=ledger, pool=pool)
        except NodeError:
            continue
    for device in TWO:
        assert sum(r.bytes_by_device.get(device.uuid, 0) for r in ledger.all()) <= device.vram_total_bytes


class WithRam(LaunchEstimator):
    """A launch that needs 1.7 GiB of the machine's memory beside what it puts on the GPU."""

    def _estimate(self, *args: Any) -> MemoryEstimate:
        return replace(super()._estimate(*args), host=EstimatePart("RAM", int(1.7 * GIB)))


def test_where_gpu_and_processor_share_one_memory_it_is_reserved_once() -> None:
    """What an engine needs beside the GPU comes out of the same memory: together no more than there is."""
    inputs = needs(1.0, overhead_gib=0.5).inputs
    for unified, fits in ((False, True), (True, False)):
        one, book = gpu(0, 22.2, unified=unified), Ledger()
        place(needs(19, overhead_gib=0.9), (one,), ledger=book, pool="a")
        try:
            place(WithRam(inputs, Measurements()), (one,), ledger=book, pool="b")
        except NodeError as refused:
            assert not fits and "needs 3.2 GiB" in refused.message and "2.3 GiB of" in refused.message
        else:
            assert fits


def test_trying_again_helps_where_it_would_for_any_gpu() -> None:
    book, devices = Ledger(), (gpu(0, 24), gpu(1, 10))
    place(needs(23), devices, mask=(0,), ledger=book, pool="q")
    with pytest.raises(NodeError, match=r"GPU 1 .* has 10 GiB when it is empty") as near:
        place(needs(11), devices, ledger=book)
    assert near.value.retriable is True, "GPU 0 may become free, and has room then"
    for split in ("auto", (0.5, 0.5)):
        with pytest.raises(NodeError) as never:
            place(needs(60), TWO, split=split, mask=(0, 1))
        assert never.value.retriable is False
