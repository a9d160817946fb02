"""Who waits, who is given a slot, and that nobody is forgotten: over drawn queues and pools."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pool_managerd.core.demand.queue import Queue, QueueRules, Ticket
from pool_managerd.core.demand.turns import Condition, Seen, Turn, turn
from pool_managerd.errors import RequestError

RULES = QueueRules(max_waiting=6, max_waiting_per_pool=3, starving_s=30)
POOLS = ("a", "b", "c")
STOPPED = RequestError("it was stopped by request", code="POOL_STOPPED", status=409)


def queued(*wanted: tuple[str, int], until: float = 100.0) -> Queue:
    queue = Queue()
    for number, (pool_id, priority) in enumerate(wanted):
        queue.add(Ticket(f"t{number}", pool_id, float(number), until, priority), QueueRules())
    return queue


def names(tickets: tuple[Ticket, ...]) -> list[str]:
    return [ticket.ticket_id for ticket in tickets]


ready, down, loading = Seen(Condition.READY, 1), Seen(Condition.DOWN), Seen(Condition.LOADING)

tickets = st.lists(st.tuples(st.sampled_from(POOLS), st.integers(-2, 2)), max_size=12)
pools = st.fixed_dictionaries({
    pool_id: st.builds(Seen, st.sampled_from(list(Condition)), st.integers(0, 3), st.just(STOPPED)) for pool_id in POOLS
})  # fmt: skip


@given(tickets, pools, st.sets(st.sampled_from(POOLS)), st.sampled_from([5.0, 200.0]))
def test_everybody_is_served_told_or_waits_and_no_slot_is_given_twice(
    wanted: list[tuple[str, int]], seen: dict[str, Seen], closing: set[str], now: float
) -> None:
    queue = queued(*wanted)
    found = turn(queue, seen, now, closing)
    told = [*found.granted, *found.expired, *(ticket for ticket, _ in found.refused)]
    assert len({ticket.ticket_id for ticket in told}) == len(told)
    for pool_id in POOLS:
        one, granted = seen[pool_id], [ticket for ticket in found.granted if ticket.pool_id == pool_id]
        free = one.free if one.condition is Condition.READY and pool_id not in closing else 0
        assert len(granted) == min(free, len(queue.of(pool_id))), "as many as there are slots, and no more"
        assert granted == queue.of(pool_id)[: len(granted)], "in their order"
        left = [ticket for ticket in queue.of(pool_id) if ticket not in told]
        assert not left or (now < 100 and one.condition is not Condition.REFUSED), "who waits may still be served"
        assert (pool_id in found.starts) == bool(left and one.condition is Condition.DOWN)


def test_the_higher_priority_goes_first_and_among_equals_who_came_first() -> None:
    queue = queued(("a", 0), ("a", 5), ("a", 0), ("b", 1))
    assert [ticket.ticket_id for ticket in queue] == ["t1", "t3", "t0", "t2"]
    assert queue.pools() == ["a", "b"] and [queue.place(ticket) for ticket in queue.of("a")] == [1, 2, 3]
    assert names(turn(queue, {"a": ready, "b": down}, 5.0).granted) == ["t1"]


def test_requests_for_a_model_that_is_loaded_go_together() -> None:
    queue = queued(("a", 0), ("b", 0), ("a", 0), ("a", 0))
    found = turn(queue, {"a": Seen(Condition.READY, 8), "b": down}, 5.0)
    assert names(found.granted) == ["t0", "t2", "t3"] and found.starts == ("b",)


def test_a_pool_that_must_go_for_somebody_who_starves_is_given_to_nobody() -> None:
    queue = queued(("b", 0), ("a", 0))
    assert names(turn(queue, {"a": ready, "b": down}, 5.0, closing={"a"}).granted) == []
    starving = queue.of("b")[0]
    assert not starving.starves(29.0, RULES) and starving.starves(30.0, RULES)


def test_a_pool_that_loads_or_ends_is_waited_for() -> None:
    found = turn(queued(("a", 0), ("b", 0)), {"a": loading, "b": Seen(Condition.ENDING)}, 5.0)
    assert found == Turn()


def test_a_slot_is_given_even_at_the_last_moment() -> None:
    queue = queued(("a", 0), ("a", 0), until=50.0)
    found = turn(queue, {"a": ready}, 50.0)
    assert names(found.granted) == ["t0"] and names(found.expired) == ["t1"] and queue.next_deadline() == 50.0


def test_only_so_many_wait_for_a_pool_and_on_the_node() -> None:
    queue = Queue()
    for number in range(3):
        queue.add(Ticket(f"a{number}", "a", 0.0, 9.0), RULES)
    with pytest.raises(RequestError, match="3 requests wait for pool 'a' already") as refused:
        queue.add(Ticket("a3", "a", 0.0, 9.0), RULES)
    assert (refused.value.status, refused.value.code, refused.value.retriable) == (429, "QUEUE_FULL", True)
    assert "queue.max_waiting_per_pool" in (refused.value.hint or "")
    for number in range(3):
        queue.add(Ticket(f"b{number}", f"b{number}", 0.0, 9.0), RULES)
    with pytest.raises(RequestError, match="6 requests wait for this node already") as full:
        queue.add(Ticket("c", "c", 0.0, 9.0), RULES)
    assert full.value.hint == "try again later, or raise queue.max_waiting"
    assert queue.remove("a1") is not None and queue.remove("a1") is None and len(queue) == 5
    queue.add(Ticket("a3", "a", 1.0, 9.0), RULES)
    assert [ticket.ticket_id for ticket in queue.of("a")] == ["a0", "a2", "a3"]
