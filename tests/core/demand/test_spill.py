"""Pools of one name: nobody waits at one while another could serve them, and nobody is overtaken by it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pool_managerd.core.demand.queue import Queue, QueueRules, Ticket
from pool_managerd.core.demand.spill import to_a_free_one, to_one_that_starts
from pool_managerd.core.demand.turns import Condition, Seen, turn
from pool_managerd.errors import RequestError

POOLS = ("a", "b", "c")
REFUSED = Seen(Condition.REFUSED, refusal=RequestError("stopped", code="POOL_STOPPED", status=409))
full, down, loading = Seen(Condition.READY), Seen(Condition.DOWN), Seen(Condition.LOADING)


def queued(*choices: tuple[str, ...]) -> Queue:
    queue = Queue()
    for number, (first, *others) in enumerate(choices):
        queue.add(Ticket(f"t{number}", first, float(number), 1000.0, others=tuple(others)), QueueRules())
    return queue


def moved(queue: Queue, seen: dict[str, Seen]) -> list[tuple[str, str]]:
    return [(ticket.ticket_id, pool_id) for ticket, pool_id in to_a_free_one(queue, seen)]


def started(queue: Queue, seen: dict[str, Seen], now: float, load_s: float = 5.0) -> list[tuple[str, str]]:
    return [(ticket.ticket_id, pool_id) for ticket, pool_id in to_one_that_starts(queue, seen, lambda _: load_s, now)]


def test_a_slot_of_another_pool_will_do() -> None:
    queue = queued(("a", "b"), ("a", "b"), ("a",))
    assert moved(queue, {"a": full, "b": Seen(Condition.READY, 1)}) == [("t0", "b")]


def test_it_stays_where_it_has_one() -> None:
    assert moved(queued(("a", "b"), ("a", "b")), {"a": Seen(Condition.READY, 1), "b": Seen(Condition.READY, 5)}) == [("t1", "b")]


def test_another_pool_is_started_by_who_has_waited_as_long_as_that_takes() -> None:
    queue = queued(("a", "b"), ("a", "b"))
    assert started(queue, {"a": full, "b": down}, 4.9) == []
    assert started(queue, {"a": full, "b": down}, 5.0) == [("t0", "b")], "once"


def test_nobody_starts_a_second_one_while_one_loads_or_starts_where_they_wait_anyway() -> None:
    assert started(queued(("a", "b", "c")), {"a": full, "b": loading, "c": down}, 99) == []
    assert started(queued(("a", "b")), {"a": down, "b": down}, 99) == []


def test_who_waits_at_a_pool_that_nobody_may_start_goes_on_at_once() -> None:
    assert started(queued(("a", "b")), {"a": REFUSED, "b": down}, 0.0) == [("t0", "b")]


seen_pools = st.fixed_dictionaries({
    pool_id: st.builds(Seen, st.sampled_from(list(Condition)), st.integers(0, 3), st.just(REFUSED.refusal)) for pool_id in POOLS
})  # fmt: skip
wanted = st.lists(st.permutations(POOLS).flatmap(lambda all_: st.integers(1, 3).map(lambda n: tuple(all_[:n]))), max_size=10)


@given(wanted, seen_pools)
def test_after_it_nobody_waits_who_could_be_served(choices: list[tuple[str, ...]], seen: dict[str, Seen]) -> None:
    queue = queued(*choices)
    before = {ticket.ticket_id: set(ticket.choices) for ticket in queue}
    for ticket, pool_id in to_a_free_one(queue, seen):
        queue.move(ticket, pool_id)
    assert {ticket.ticket_id: set(ticket.choices) for ticket in queue} == before, "no choice is lost, and nobody"
    found = turn(queue, seen, 5.0)
    left = {one: seen[one].free if seen[one].condition is Condition.READY else 0 for one in POOLS}
    for ticket in found.granted:
        left[ticket.pool_id] -= 1
    assert min(left.values()) >= 0
    waiting = [ticket for ticket in queue if ticket not in found.granted]
    assert not any(left[pool_id] for ticket in waiting for pool_id in ticket.choices)
