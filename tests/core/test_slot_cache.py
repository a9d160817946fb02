"""Which saved slots may be restored, which make room, and when a restore is believed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pool_managerd.core.slot_cache import (
    MAX_LOST_CHARS,
    PARTS,
    SPARE_BYTES,
    Restored,
    SlotFile,
    SlotSaving,
    SlotState,
    differences,
    name_of,
    proven,
    restorable,
    room_for,
    slot_of,
    temporary_name,
    worth_saving,
)

KEY = {"model": "m", "engine": "b1", "context": "4096", "slots": "2", "cache": "", "flags": "--flash-attn on"}
MUCH = 1 << 50

sizes = st.integers(0, 1 << 40)
files = st.lists(
    st.builds(SlotFile, st.sampled_from(["a", "b"]), st.uuids().map(str), sizes, st.floats(0, 1e9)), max_size=12
)  # fmt: skip


def file(name: str, size_bytes: int = 1, written_at: float = 0.0) -> SlotFile:
    return SlotFile("p", name, size_bytes, written_at)


def test_a_name_says_slot_and_tokens_and_can_be_a_file_name_anywhere() -> None:
    name = name_of(KEY, 3, 2003)
    assert slot_of(name) == (3, 2003) and differences(KEY, name) == ()
    assert len(name) < 128 and "/" not in name and name.isascii()


@pytest.mark.parametrize("name", [temporary_name(7, 0), "", "slot-0-10.kv", "../x", name_of(KEY, 0, 1) + "x", "slot-0-1-00.kv"])
def test_what_has_another_name_is_not_whole(name: str) -> None:
    assert slot_of(name) is None and differences(KEY, name)


@pytest.mark.parametrize("part", PARTS)
def test_a_file_of_another_key_is_never_restored_and_the_part_that_differs_is_named(part: str) -> None:
    saved = file(name_of(KEY, 0, 500))
    now = {**KEY, part: "another"}
    assert restorable([saved], KEY, 2) == {0: saved}
    assert restorable([saved], now, 2) == {}
    assert differences(now, saved.name) == (PARTS[part],)


def test_of_two_files_of_one_slot_the_newer_is_restored_and_none_into_a_slot_that_is_not_there() -> None:
    old, new, beyond = file(name_of(KEY, 0, 500), 1, 1.0), file(name_of(KEY, 0, 700), 1, 2.0), file(name_of(KEY, 2, 700), 1, 3.0)
    assert restorable([new, beyond, old], KEY, 2) == {0: new}


@pytest.mark.parametrize(
    ("state", "worth"),
    [
        (SlotState(0, 256, busy=False), True), (SlotState(0, 255, busy=False), False), (SlotState(0, 9999, busy=True), False),
        (SlotState(0, None, busy=False), True),
    ],
)  # fmt: skip
def test_a_slot_is_saved_that_is_at_rest_and_holds_enough(state: SlotState, worth: bool) -> None:
    assert worth_saving(state, 256) is worth


@given(files, sizes, sizes, sizes, sizes)
def test_what_stays_and_what_comes_is_within_the_budget_and_leaves_the_disk_its_rest(
    known: list[SlotFile], need: int, budget: int, free: int, reserved: int
) -> None:
    room = room_for(need, known, budget_bytes=budget, free_bytes=free, reserved_bytes=reserved)
    assert not (room.why_not and room.remove), "nothing goes for what does not come"
    if room.why_not:
        return
    kept = [each for each in known if each not in room.remove]
    assert sum(each.size_bytes for each in kept) + need + reserved <= budget
    assert free + sum(each.size_bytes for each in room.remove) >= need + reserved + SPARE_BYTES
    newest_gone = max((each.written_at for each in room.remove), default=-1.0)
    assert all(each.written_at >= newest_gone for each in kept), "the oldest go first"
    if room.remove:
        fewer = room.remove[:-1]
        used = sum(each.size_bytes for each in known if each not in fewer)
        left = free + sum(each.size_bytes for each in fewer)
        assert used + need + reserved > budget or left < need + reserved + SPARE_BYTES, "no more go than must"


def test_files_that_may_not_go_count_and_stay() -> None:
    small = file("old", 100, 1.0)
    assert room_for(500, [small], budget_bytes=900, free_bytes=MUCH, fixed_bytes=400).remove == (small,)
    room = room_for(501, [small], budget_bytes=900, free_bytes=MUCH, fixed_bytes=400)
    assert room.remove == () and "taken by other slots of this stop" in room.why_not


def test_losses_are_told_each_once_and_no_more_than_fit() -> None:
    assert Restored(1, 5).telling([]) == Restored(1, 5)
    assert Restored(1, 5).telling(["a", "b", "a"]) == Restored(1, 5, "a; b")
    assert Restored().telling(["x" * 5000]).lost == "x" * 5000, "an engine's words are cut after secrets are taken out"
    lost = Restored().telling([f"{number:0100}" for number in range(300)]).lost
    assert len(lost) < MAX_LOST_CHARS + 20 and lost.endswith("; 291 more")


def test_why_there_is_no_room_names_the_key_to_change_or_the_disk() -> None:
    assert "slot_cache.disk_bytes allows 1 GiB" in room_for(2 << 30, [], budget_bytes=1 << 30, free_bytes=MUCH).why_not
    assert "the disk has 1 MiB free" in room_for(1, [], budget_bytes=MUCH, free_bytes=1 << 20).why_not


@given(st.integers(1, 1 << 22))
def test_a_restore_is_believed_when_nearly_all_of_it_was_there(tokens: int) -> None:
    assert proven(tokens, tokens - tokens // 20)
    assert not proven(tokens, tokens // 2)
    assert not proven(tokens, 0)


def test_what_is_saved_of_a_launch_comes_back_from_its_record_and_nothing_else_does() -> None:
    saving = SlotSaving("/run/cache/p/slots", KEY)
    assert SlotSaving.from_json(saving.to_json()) == saving
    wrong: list[object] = [None, [], "x", {}, {"directory": 1, "key": {}}, {"directory": "/x", "key": []}]
    assert [SlotSaving.from_json(data) for data in wrong] == [None] * len(wrong)
