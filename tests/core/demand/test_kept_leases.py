"""Leases that are kept between requests: nobody has the same one, and none is kept where somebody waits for it."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pool_managerd.core.demand.kept_leases import HeldLease, KeptLeases


def lease(number: int, pool_id: str = "a", epoch: int = 1) -> HeldLease:
    return HeldLease(f"l{number}", pool_id, "http://127.0.0.1:8080", epoch)


def kept(*leases: HeldLease, linger_s: float = 1.0, waiting: bool = False) -> KeptLeases:
    """All of them idle since 0."""
    found = KeptLeases(linger_s)
    found.see({"a": 1, "b": 1}, waiting=False)
    for one in leases:
        found.add(one)
        assert not found.done(one, 0.0)
    found.see({"a": 1, "b": 1}, waiting=waiting)
    return found


def test_the_next_request_has_the_lease_of_the_last_one() -> None:
    found = kept(lease(1), lease(2))
    assert found.take(["a"]) == lease(2) and found.take(["a"]) == lease(1) and found.take(["a"]) is None


def test_of_pools_with_one_name_the_one_that_is_used_least_is_taken() -> None:
    found = kept(lease(1, "a"), lease(2, "a"), lease(3, "b"))
    first = found.take(["a", "b"])
    second = found.take(["a", "b"])
    assert first is not None and second is not None and {first.pool_id, second.pool_id} == {"a", "b"}


def test_it_is_given_back_when_it_was_kept_for_long_enough() -> None:
    found = kept(lease(1))
    assert found.due(0.5) == [] and found.next_due() == 1.0
    assert found.due(1.0) == [lease(1)] and found.all() == [] and found.next_due() is None


def test_nothing_is_kept_while_somebody_waits() -> None:
    found = kept(lease(1), waiting=True)
    assert found.due(0.0) == [lease(1)]
    found.add(lease(2))
    assert found.done(lease(2), 0.0)


def test_a_lease_of_an_engine_that_takes_no_more_requests_is_neither_used_nor_kept() -> None:
    found = kept(lease(1))
    found.see({"a": 2}, waiting=False)
    assert found.take(["a"]) is None and found.due(0.0) == [lease(1)]
    found.add(lease(2))
    assert found.done(lease(2), 0.0), "its launch was replaced"


def test_one_that_ended_with_its_engine_is_not_given_back() -> None:
    found = kept(lease(1))
    taken = found.take(["a"])
    assert taken is not None
    found.forget("l1")
    assert not found.done(taken, 0.0) and found.all() == []


class Traffic(RuleBasedStateMachine):
    """Whatever comes in any order: each lease is in one place, and is given back once."""

    def __init__(self) -> None:
        super().__init__()
        self.kept, self.now, self.given = KeptLeases(2.0), 0.0, 0
        self.open, self.waiting = {"a": 1, "b": 1}, False
        self.kept.see(dict(self.open), waiting=False)
        self.used: list[HeldLease] = []
        self.outside: set[str] = set()
        """What is held, from the node's point of view."""

    @rule(pools=st.sampled_from([["a"], ["b"], ["a", "b"]]))
    def begin(self, pools: list[str]) -> None:
        taken = self.kept.take(pools)
        if taken is None:
            if not (ready := [pool_id for pool_id in pools if pool_id in self.open]):
                return
            self.given += 1
            taken = lease(self.given, ready[0], self.open[ready[0]])
            self.outside.add(taken.lease_id)
            self.kept.add(taken)
        assert taken not in self.used, "it is somebody else's"
        assert taken.pool_id in pools and self.open.get(taken.pool_id) == taken.epoch
        self.used.append(taken)

    @precondition(lambda self: self.used)
    @rule(which=st.integers(0, 9))
    def end(self, which: int) -> None:
        one = self.used.pop(which % len(self.used))
        back = self.kept.done(one, self.now)
        if back:
            self.outside.remove(one.lease_id)
        assert back or not self.waiting or one.lease_id not in self.outside

    @rule(seconds=st.sampled_from([0.1, 1.0, 2.5]))
    def later(self, seconds: float) -> None:
        self.now += seconds
        self.return_due()

    @rule(pool_id=st.sampled_from(["a", "b"]), up=st.booleans(), waiting=st.booleans())
    def told(self, pool_id: str, up: bool, waiting: bool) -> None:
        if up:
            self.open[pool_id] = self.open.get(pool_id, self.given) + 1
        else:
            self.open.pop(pool_id, None)
        self.waiting = waiting
        self.kept.see(dict(self.open), waiting=waiting)
        self.return_due()

    @precondition(lambda self: self.used)
    @rule(which=st.integers(0, 9))
    def engine_ends(self, which: int) -> None:
        one = self.used[which % len(self.used)]
        self.kept.forget(one.lease_id)
        self.outside.discard(one.lease_id)

    def return_due(self) -> None:
        for one in self.kept.due(self.now):
            assert one not in self.used, "it is in use"
            self.outside.remove(one.lease_id)

    @invariant()
    def nothing_is_lost(self) -> None:
        assert {one.lease_id for one in self.kept.all()} == self.outside
        idle = self.outside - {one.lease_id for one in self.used}
        assert not (self.waiting and idle), "somebody waits for it"
        assert (self.kept.next_due() is None) == (not idle)


TestTraffic = Traffic.TestCase
