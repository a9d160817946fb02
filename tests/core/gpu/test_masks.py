"""Which GPUs a mask means, and what is refused."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pool_managerd.core.gpu.mask_gpus import MaskGpu, resolve
from pool_managerd.core.gpu.masks import DeviceMask
from pool_managerd.errors import NodeError, SpecError
from tests.core.gpus import gpu, mig

EIGHT = tuple(gpu(i, 80) for i in range(8))
PARENT = gpu(0, 80, mig_enabled=True)
MIGS = (PARENT, mig(PARENT, 1), mig(PARENT, 2), gpu(1, 80))


@pytest.mark.parametrize(
    ("text", "items"),
    [("0,1", (0, 1)), ("GPU0,GPU1", (0, 1)), ("gpu3", (3,)), (" 2 , 0 ", (2, 0)), ("GPU-00000001,0", ("GPU-00000001", 0))],
)
def test_indices_names_and_uuids_are_understood(text: str, items: tuple[int | str, ...]) -> None:
    assert DeviceMask.parse(text).items == items


@pytest.mark.parametrize(
    ("text", "why"),
    [("", "it is empty"), ("  ", "it is empty"), ("0,,1", "an empty part"), ("0,", "an empty part"), ("-1", "-1 is negative"),
     ("0,0", "names 0 twice"), ("GPU0,0", "names 0 twice"), ("zero", "neither an index"), ("1.5", "neither an index"),
     ("٣", "neither an index"), ("GPU-", "neither an index"), (",".join(map(str, range(65))), "more than 64")],
)  # fmt: skip
def test_what_is_no_mask_is_refused_with_the_part_at_fault(text: str, why: str) -> None:
    with pytest.raises(SpecError, match=why):
        DeviceMask.parse(text)


def test_an_unknown_device_is_refused_and_what_exists_is_listed() -> None:
    with pytest.raises(SpecError, match=r"there is no device 9; there are 0 \(NVIDIA Test\), 1 \(NVIDIA Test\)"):
        DeviceMask.parse("0,9").validate_against_discovered(EIGHT[:2])
    with pytest.raises(SpecError, match="there is no device GPU-9; there are 0"):
        DeviceMask.parse("GPU-9").resolve(EIGHT)
    with pytest.raises(SpecError, match="no GPU was found"):
        DeviceMask.parse("0").validate_against_discovered(())


def test_an_index_and_a_uuid_of_one_device_are_the_same_device() -> None:
    with pytest.raises(SpecError, match="the same device"):
        DeviceMask.parse("1,GPU-00000001").resolve(EIGHT)


def test_mig_instances_are_named_by_uuid_and_not_mixed_with_whole_gpus() -> None:
    assert DeviceMask.parse("MIG-0-2").to_cuda_visible_devices(MIGS) == "MIG-0-2"
    with pytest.raises(SpecError, match="mixes MIG instances with whole GPUs"):
        DeviceMask.parse("MIG-0-1,1").resolve(MIGS)
    with pytest.raises(SpecError, match="GPU 0 is in MIG mode") as refused:
        DeviceMask.parse("0").resolve(MIGS)
    assert refused.value.hint == "name its instances: MIG-0-1, MIG-0-2"


def test_every_refusal_of_a_mask_shows_it_and_says_what_to_write() -> None:
    def refused(text: str) -> SpecError:
        with pytest.raises(SpecError) as caught:
            DeviceMask.parse(text).resolve(MIGS)
        assert caught.value.code == "INVALID_PARAMS"
        return caught.value

    assert refused("0,").hint == "leave `devices` out to allow all GPUs"
    assert refused("1,1").hint == "write `devices: [0, 1]`, or UUIDs as `nvidia-smi -L` shows them"
    for mixed in ("MIG-0-1,1", "MIG-0-1,GPU-00000001"):
        assert refused(mixed).hint == "give the pool one kind of device" and repr(mixed) in refused(mixed).message
    assert "the device mask '0':" in refused("0").message
    with pytest.raises(SpecError, match="mixes MIG"):
        DeviceMask.parse("MIG-0-1,1")
    assert refused("x" * 81).message.startswith(f"cannot use the device mask '{'x' * 80}…': '{'x' * 80}' is neither")
    assert refused("x" * 80).message.startswith(f"cannot use the device mask '{'x' * 80}': ")
    with pytest.raises(SpecError) as empty:
        DeviceMask.parse("0").resolve((PARENT,))
    assert empty.value.hint == "create MIG instances, or turn MIG off"


def test_a_mask_names_up_to_64_devices() -> None:
    assert len(DeviceMask.parse(",".join(map(str, range(64)))).items) == 64


def test_only_an_index_can_come_to_mean_another_gpu() -> None:
    assert DeviceMask.parse("GPU-1,0").has_indices and not DeviceMask.parse("GPU-1").has_indices
    assert str(DeviceMask.parse("GPU-1, 0")) == "GPU-1,0"


def test_an_engine_is_shown_uuids_in_pci_order() -> None:
    assert DeviceMask.parse("2,0").to_cuda_visible_devices(EIGHT) == "GPU-00000000,GPU-00000002"
    assert DeviceMask.parse("2,0").to_cuda_visible_devices() == "2,0"


@given(st.lists(st.integers(0, 7), min_size=1, unique=True), st.integers())
def test_the_order_of_mask_and_scan_does_not_matter(indices: list[int], seed: int) -> None:
    shuffled = list(EIGHT)
    random.Random(seed).shuffle(shuffled)
    mask = DeviceMask.parse(",".join(map(str, indices)))
    assert mask.to_cuda_visible_devices(shuffled) == DeviceMask(tuple(sorted(indices))).to_cuda_visible_devices(EIGHT)


# --- the numbering changes under a pool ---


def test_a_bound_index_stays_with_its_gpu_when_the_numbering_changes() -> None:
    mask = DeviceMask.parse("1")
    first = resolve(mask, EIGHT[:2], {})
    swapped = (gpu(0, 80, uuid="GPU-00000001", pci_bus_id="00000000:02:00.0"), gpu(1, 80, uuid="GPU-00000000"))
    again = resolve(mask, swapped, first.gpus)
    assert [d.uuid for d in again.devices] == ["GPU-00000001"]
    assert again.notices == ("The GPUs of the mask 1 are counted anew (1 is 0 now); the pool stays on them",)


def test_a_bound_gpu_that_is_gone_is_an_error_and_not_its_neighbour() -> None:
    mask = DeviceMask.parse("7")
    first = resolve(mask, EIGHT, {})
    with pytest.raises(NodeError, match=r"GPU 7 was GPU-00000007 at 00000000:08:00\.0, which is gone") as gone:
        resolve(mask, EIGHT[:7], first.gpus)
    assert gone.value.code == "GPU_UNAVAILABLE" and gone.value.retriable, "it may come back"


def test_the_middle_gpu_is_lost_and_the_last_one_is_not_taken_for_it() -> None:
    mask = DeviceMask.parse("3")
    first = resolve(mask, EIGHT, {})
    renumbered = tuple(gpu(i, 80, uuid=d.uuid, pci_bus_id=d.pci_bus_id) for i, d in enumerate(EIGHT[:3] + EIGHT[4:]))
    with pytest.raises(NodeError, match="which is gone"):
        resolve(mask, renumbered, first.gpus)


def test_a_gpu_replaced_in_its_slot_is_taken_and_said() -> None:
    new = resolve(DeviceMask.parse("0"), (gpu(0, uuid="GPU-new"),), {0: MaskGpu("GPU-old", "00000000:01:00.0")})
    assert new.gpus == {0: MaskGpu("GPU-new", "00000000:01:00.0")}
    assert new.notices == ("GPU 0 of the mask 0 was replaced in its slot 00000000:01:00.0; the pool uses the new one",)


def test_the_gpus_of_a_mask_are_remembered_by_their_index_and_those_named_by_uuid_are_not() -> None:
    found = resolve(DeviceMask.parse("1,GPU-00000000"), EIGHT[:2], {})
    assert found.gpus == {1: MaskGpu("GPU-00000001", "00000000:02:00.0")} and found.notices == ()
    assert [d.id for d in found.devices] == [1, 0], "in the order of the mask"
    again = resolve(DeviceMask.parse("1"), EIGHT[:2], found.gpus)
    assert again.gpus == found.gpus and again.notices == ()


def test_what_is_there_instead_of_a_gpu_that_is_gone_is_told() -> None:
    mask, known = DeviceMask.parse("1"), {1: MaskGpu("GPU-old", "")}
    with pytest.raises(NodeError, match=r"mask '1': GPU 1 was GPU-old at , which is gone \(0 is GPU-00000000\)"):
        resolve(mask, (EIGHT[0],), known)
    with pytest.raises(NodeError, match=r"\(none is left\)") as gone:
        resolve(mask, (), known)
    assert gone.value.hint == "bring the GPU back, or name another one in `devices`; a UUID says which one is meant"
