"""Rules on what is loaded together: they mean what the same rules mean to llama-swap, whose users bring theirs along."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pool_managerd.core.demand.room import Fits, Resident, plan_room
from pool_managerd.core.demand.together import Group, Together

POOLS = "abcdefg"
some = st.frozensets(st.sampled_from(POOLS), min_size=1)
requests = st.lists(st.sampled_from(POOLS), max_size=12)
Evicts = Callable[[str, Sequence[str]], set[str]]


@st.composite
def everyone_in_a_group(draw: st.DrawFn) -> tuple[Group, ...]:
    of = {pool_id: draw(st.integers(0, 2)) for pool_id in POOLS}
    flags = [draw(st.tuples(st.booleans(), st.booleans(), st.booleans())) for _ in range(3)]
    members = [frozenset(pool_id for pool_id in POOLS if of[pool_id] == number) for number in range(3)]
    return tuple(Group(str(number), members[number], *flags[number]) for number in range(3) if members[number])


def group_rules_of_llama_swap(groups: Sequence[Group]) -> Evicts:
    def evicts(wanted: str, running: Sequence[str]) -> set[str]:
        of = {pool_id: group for group in groups for pool_id in group.pools}
        mine, gone = of[wanted], set()
        for other in running:
            if other != wanted and of[other] is mine and mine.swap:
                gone.add(other)
            if of[other] is not mine and mine.exclusive and not of[other].persistent:
                gone.add(other)
        return gone

    return evicts


def matrix_rules_of_llama_swap(sets: Sequence[Collection[str]], costs: dict[str, int]) -> Evicts:
    def evicts(wanted: str, running: Sequence[str]) -> set[str]:
        if wanted in running:
            return set()
        outside = [[other for other in running if other not in one] for one in sets if wanted in one]
        return set(min(outside, key=lambda gone: sum(costs[one] for one in gone), default=running))

    return evicts


def may_load(rules: Together, wanted: str, loaded: Sequence[str]) -> Fits:
    return lambda gone: not all(rules.ways(wanted, [one for one in loaded if one not in gone]))


def check(rules: Together, theirs: Evicts, asked: Sequence[str], costs: dict[str, int]) -> None:
    """The same pools go, request by request, where memory has room for all and nothing is in flight."""
    running: list[str] = []
    for wanted in asked:
        if wanted in running:
            continue
        residents = [Resident(one, weight=costs[one], idle_s=ord(one)) for one in running]
        plan = plan_room(residents, may_load(rules, wanted, running), rules.ways(wanted, running))
        assert plan is not None and set(plan.evict) == theirs(wanted, running) and not plan.waits_for
        running = [one for one in running if one not in plan.evict] + [wanted]


@given(everyone_in_a_group(), requests)
def test_groups_evict_what_llama_swap_would_evict(groups: tuple[Group, ...], asked: list[str]) -> None:
    check(Together(groups), group_rules_of_llama_swap(groups), asked, dict.fromkeys(POOLS, 1))


@given(st.lists(some, min_size=1, max_size=5), requests, st.lists(st.integers(1, 3), min_size=7, max_size=7))
def test_sets_evict_what_llama_swaps_matrix_would_evict(sets: list[frozenset[str]], asked: list[str], weights: list[int]) -> None:
    costs = dict(zip(POOLS, weights, strict=True))
    check(Together(sets=tuple(sets)), matrix_rules_of_llama_swap(sets, costs), asked, costs)


@given(st.lists(some, min_size=1, max_size=5), some, st.sampled_from(POOLS))
def test_what_is_left_after_one_of_the_ways_is_part_of_a_set_or_alone(
    sets: list[frozenset[str]], loaded: frozenset[str], wanted: str
) -> None:
    rules = Together(sets=tuple(sets))
    for way in rules.ways(wanted, loaded):
        left = (loaded - way) | {wanted}
        assert left == {wanted} or any(left <= one for one in sets)


def test_a_way_that_a_pinned_pool_stands_in_is_not_taken() -> None:
    rules, loaded = Together(sets=(frozenset("ab"), frozenset("ac"))), ["b", "c"]
    residents = [Resident("b", weight=1, kept="it is pinned"), Resident("c", weight=9)]
    plan = plan_room(residents, may_load(rules, "a", loaded), rules.ways("a", loaded))
    assert plan is not None and plan.evict == ("c",)


def test_memory_has_more_go_than_the_rules_alone() -> None:
    rules, loaded = Together((Group("g", frozenset("ab")),)), ["b", "c", "d"]
    may, residents = may_load(rules, "a", loaded), [Resident("b", idle_s=1), Resident("c", idle_s=5), Resident("d", idle_s=9)]
    plan = plan_room(residents, lambda gone: len(gone) >= 2 and may(gone), rules.ways("a", loaded))
    assert plan is not None and plan.evict == ("b", "d")


@pytest.mark.parametrize(
    ("rules", "never"),
    [
        (Together(), False),
        (Together((Group("g", frozenset("ab")),)), True),
        (Together((Group("g", frozenset("ab"), swap=False),)), False),
        (Together((Group("g", frozenset("a"), exclusive=True),)), True),
        (Together((Group("g", frozenset("a"), exclusive=True), Group("h", frozenset("b"), persistent=True))), False),
        (Together(sets=(frozenset("ab"),)), False),
        (Together(sets=(frozenset("ac"),)), True),
    ],
)
def test_whether_two_may_start_with_the_daemon(rules: Together, never: bool) -> None:
    assert rules.never("a", "b") is never is rules.never("b", "a")
