"""What goes so that another model fits: never more than has to, never what must stay, what costs least first."""

from __future__ import annotations

from collections.abc import Collection

from hypothesis import given
from hypothesis import strategies as st

from pool_managerd.core.demand.room import Resident, RoomPlan, plan_room

residents = st.lists(
    st.builds(
        Resident, st.text("abcdefgh", min_size=1, max_size=2), st.integers(0, 2), st.floats(0, 1e4), st.floats(0, 300),
        st.floats(0.1, 10), st.sampled_from(["", "", "it is pinned"]),
    ),
    max_size=6, unique_by=lambda one: one.pool_id,
)  # fmt: skip


@given(residents, st.lists(st.integers(1, 10), min_size=6, max_size=6), st.integers(0, 40), st.integers(1, 30))
def test_as_little_goes_as_has_to_and_nothing_that_must_stay(
    there: list[Resident], sizes: list[int], free: int, needs: int
) -> None:
    held = {one.pool_id: size for one, size in zip(there, sizes, strict=False)}

    def fits(gone: Collection[str]) -> bool:
        return free + sum(held[pool_id] for pool_id in gone) >= needs

    found, may_go = plan_room(there, fits), {one.pool_id: one for one in there if not one.kept}
    if found is None:
        assert not fits(may_go)
        return
    gone = {*found.evict, *found.waits_for}
    assert fits(gone) and gone <= may_go.keys() and len(gone) == len(found.evict) + len(found.waits_for)
    assert all(not fits(gone - {pool_id}) for pool_id in gone), "no one of them may stay"
    assert all(not may_go[pool_id].in_hand for pool_id in found.evict) and all(may_go[one].in_hand for one in found.waits_for)
    if found.waits_for:
        assert not fits({pool_id for pool_id, one in may_go.items() if not one.in_hand}), "nobody is waited for in vain"


def one_of(gone: Collection[str]) -> bool:
    return len(gone) >= 1


def test_what_is_idle_longest_for_what_it_costs_to_bring_back_goes() -> None:
    cheap, dear = Resident("cheap", idle_s=60, back_s=2), Resident("dear", idle_s=600, back_s=90)
    assert plan_room([dear, cheap], one_of) == RoomPlan(("cheap",))
    assert plan_room([dear, Resident("cheap", idle_s=60, back_s=2, weight=10)], one_of) == RoomPlan(("dear",))


def test_what_has_the_fewest_requests_is_waited_for_where_all_are_in_use() -> None:
    assert plan_room([Resident("a", in_hand=3), Resident("b", in_hand=1)], one_of) == RoomPlan((), ("b",))


def test_nothing_goes_where_there_is_room_or_where_that_would_not_help() -> None:
    assert plan_room([Resident("a")], lambda gone: True) == RoomPlan()
    assert plan_room([Resident("a"), Resident("b", kept="it is pinned")], lambda gone: len(gone) == 2) is None
