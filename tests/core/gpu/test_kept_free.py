"""What of a GPU is for others: never more than there is, whole where a person or a program has it, ours where nobody does."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pool_managerd.core.gpu.accounts import Reservation, account, without
from pool_managerd.core.gpu.kept_free import FreeRules, KeptFree, kept_free
from pool_managerd.core.instance_id import InstanceId
from tests.core.gpus import GIB, gpu, process

A = InstanceId("a")


@given(st.integers(0, 24), st.integers(0, 24), st.integers(0, 30), st.booleans())
def test_what_is_kept_free_is_neither_available_nor_more_than_there_is(theirs: int, ours: int, free: int, whole: bool) -> None:
    device = gpu(0, 24, processes=(process(1, min(theirs, 24 - min(ours, 24))),))
    keep = {device.uuid: KeptFree(None if whole else free * GIB, "because")}
    reserved = [Reservation(A, 1, {device.uuid: ours * GIB})] if ours else []
    one = account([device], reserved, {}, kept_free=keep)[device.uuid]
    plain = account([device], reserved, {})[device.uuid]
    rest = device.vram_total_bytes - device.vram_reserved_bytes - one.foreign_bytes
    assert 0 <= one.kept_free_bytes <= max(0, rest) and plain.kept_free_bytes == plain.shortfall_bytes == 0
    assert one.available_bytes <= max(0, plain.available_bytes - (0 if whole else min(free * GIB, one.kept_free_bytes)))
    assert one.available_bytes == 0 or one.shortfall_bytes == 0
    assert without(one, A).shortfall_bytes == 0, "nothing of ours is left that could go"
    if whole:
        assert one.available_bytes == 0 and (one.shortfall_bytes > 0) is (ours > 0)


def test_a_program_that_is_named_has_its_gpu_to_itself_and_ours_of_that_name_does_not_count() -> None:
    devices = (
        gpu(0, 24, processes=(process(7, 1, name="/usr/bin/blender-4.2"),)),
        gpu(1, 24, processes=(process(8, 1, name="python"),)),
    )
    rules = FreeRules(programs=("blender*", "python"))
    assert {uuid: one.whole for uuid, one in kept_free(devices, rules, {}, {8}).items()} == {devices[0].uuid: True}
    assert set(kept_free(devices, rules, {}, ())) == {d.uuid for d in devices}
    assert kept_free(devices, FreeRules(), {}, ()) == {}


def test_a_rule_for_all_gpus_gives_way_to_what_is_left_altogether() -> None:
    devices = (gpu(0, 24), gpu(1, 24))
    found = kept_free(devices, FreeRules(GIB), {devices[1].uuid: KeptFree(None, "yielded")}, ())
    assert (found[devices[0].uuid].size_bytes, found[devices[1].uuid].size_bytes) == (GIB, None)
