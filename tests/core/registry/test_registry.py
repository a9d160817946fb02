"""The registry by the names the seeds fix (ORCH-3501..3505, B-REG-*)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pool_managerd.core.health import HealthStatus
from pool_managerd.core.registry import KeptLeases, Lease, LeaseChange, PerfHints, Registry
from pool_managerd.errors import RequestError, SpecError


@pytest.fixture
def registry() -> Registry:
    return Registry(clock_ms=lambda: 1_700_000_000_000, salt="test")


def test_getters_of_an_unknown_pool_give_defaults_and_create_nothing(registry: Registry) -> None:
    assert registry.get_health("p") is None
    assert registry.get_last_error("p") is None
    assert registry.get_heartbeat("p") is None
    assert registry.get_version("p") is None
    assert registry.get_draining("p") is False
    assert registry.get_active_leases("p") == 0
    assert registry.pool_ids() == []


def test_any_setter_creates_an_unknown_pool(registry: Registry) -> None:
    registry.set_last_error("a", "boom")
    registry.set_health("b", True, False)
    registry.set_slots("c", 4, 9)
    assert registry.pool_ids() == ["a", "b", "c"]
    assert registry.get_health("b") == HealthStatus(live=True, ready=False)
    assert registry.get_health("a") == HealthStatus(live=False, ready=False)


def test_register_and_deregister_say_whether_something_changed(registry: Registry) -> None:
    assert registry.register("p") is True
    assert registry.register("p") is False
    assert registry.deregister("p") is True
    assert registry.deregister("p") is False


def test_leases_are_counted_and_never_negative(registry: Registry) -> None:
    assert registry.allocate_lease("p") == 1
    assert registry.allocate_lease("p") == 2
    assert registry.release_lease("p") == 1
    assert registry.release_lease("p") == 0
    assert registry.release_lease("p") == 0
    assert registry.get_active_leases("other") == 0


def test_a_draining_pool_refuses_leases_but_lets_them_end(registry: Registry) -> None:
    registry.allocate_lease("p")
    registry.set_draining("p", True)
    with pytest.raises(RequestError, match="draining") as refused:
        registry.allocate_lease("p")
    assert refused.value.code == "POOL_DRAINING"
    assert registry.release_lease("p") == 0
    assert registry.get_draining("p") is True


def test_no_more_leases_than_slots(registry: Registry) -> None:
    registry.set_slots("p", 2, 2)
    registry.allocate_lease("p")
    lease = registry.grant("p", holder="orchestrator")
    with pytest.raises(RequestError) as refused:
        registry.grant("p")
    assert refused.value.code == "NO_FREE_SLOTS"
    assert registry.get_slots("p") == (2, 0)
    registry.release("p", lease.lease_id)
    assert registry.get_slots("p") == (2, 1)


@pytest.mark.parametrize(
    ("total", "free", "seen"), [(4, 9, (4, 4)), (4, -1, (4, 0)), (4, 3, (4, 3)), (4, None, (4, 4)), (None, 3, (None, 3))]
)
def test_free_slots_are_clamped(
    registry: Registry, total: int | None, free: int | None, seen: tuple[int | None, int | None]
) -> None:
    registry.set_slots("p", total, free)
    assert registry.get_slots("p") == seen


def test_releasing_a_lease_twice_counts_once_and_an_unknown_id_is_not_found(registry: Registry) -> None:
    first, second = registry.grant("p"), registry.grant("p")
    assert registry.release("p", first.lease_id) == 1
    assert registry.release("p", first.lease_id) == 1
    for wrong in ("", "nonsense", f"{first.lease_id}0", first.lease_id.rpartition("-")[0] + "-7", second.lease_id.upper() + "-"):
        with pytest.raises(RequestError) as missing:
            registry.release("p", wrong)
        assert missing.value.status == 404
    registry.register("q")
    with pytest.raises(RequestError):
        registry.release("q", second.lease_id)
    assert registry.get_active_leases("p") == 1


def test_a_pool_that_comes_back_under_its_name_has_leases_of_its_own(registry: Registry) -> None:
    old = registry.grant("p")
    registry.deregister("p")
    new = registry.grant("p")
    assert new.lease_id != old.lease_id
    with pytest.raises(RequestError):
        registry.release("p", old.lease_id)


def test_ids_of_two_daemons_are_never_the_same() -> None:
    ids = {Registry(clock_ms=lambda: 0, salt=salt).grant("p").lease_id for salt in ("a", "b")}
    assert len(ids) == 2 and {len(lease_id) for lease_id in ids} == {14}


def test_leases_expire_by_the_clock_they_are_given(registry: Registry) -> None:
    registry.grant("p", expires_at=10.0)
    kept = registry.grant("p", expires_at=20.0)
    assert registry.next_expiry("p", 0) == 10.0
    assert len(registry.expire("p", 0, 10.0)) == 1
    registry.renew("p", kept.lease_id, 30.0)
    assert registry.next_expiry("p", 0) == 30.0
    assert registry.end_leases("p", 0) == 1
    assert registry.release("p", kept.lease_id) == 0, "an ended lease can still be given back"
    with pytest.raises(RequestError):
        registry.renew("p", kept.lease_id, 40.0)


def test_a_handoff_makes_ready_clears_the_error_and_leaves_absent_facts_absent(registry: Registry) -> None:
    registry.set_last_error("p", "boom")
    registry.set_draining("p", True)
    registry.register_ready_from_handoff(
        "p", {"engine_version": "llamacpp-b1", "device_mask": "0,1", "slots_total": 4, "new": "key"}
    )
    assert registry.get_health("p") == HealthStatus(live=True, ready=True)
    assert registry.get_last_error("p") is None and registry.get_draining("p") is False
    assert registry.get_heartbeat("p") == 1_700_000_000_000
    assert registry.get_engine_version("p") == "llamacpp-b1" and registry.get_device_mask("p") == "0,1"
    registry.register_ready_from_handoff("q", {})
    assert registry.get_slots("q") == (None, None)


def test_engine_meta_overwrites_only_what_is_supplied(registry: Registry) -> None:
    registry.set_engine_meta("p", version="v1", digest="sha256:aa", catalog_id="c1")
    registry.set_engine_meta("p", digest="sha256:bb")
    entry = registry.get("p")
    assert entry is not None
    assert (entry.engine_version, entry.engine_digest, entry.engine_catalog_id) == ("v1", "sha256:bb", "c1")


def test_update_merges_known_fields_and_refuses_others(registry: Registry) -> None:
    registry.update("p", {"engine_version": "v1", "slots_total": 3})
    registry.update("p", {"device_mask": "0"})
    assert registry.get_engine_version("p") == "v1" and registry.get_device_mask("p") == "0" and registry.get_slots("p") == (3, 3)
    with pytest.raises(SpecError, match="crash_count"):
        registry.update("p", {"crash_count": 3})


def test_snapshots_are_sorted_complete_and_versioned(registry: Registry) -> None:
    assert registry.snapshots() == []
    for pool_id in ("b", "a", "c"):
        registry.register(pool_id)
    assert [snapshot.pool_id for snapshot in registry.snapshots()] == ["a", "b", "c"]
    before = registry.revision
    registry.set_version("a", "2")
    assert registry.revision > before
    assert registry.snapshots()[0].version == "2"


def test_what_was_set_is_what_is_read(registry: Registry) -> None:
    registry.set_heartbeat("p", 5)
    registry.set_last_error("p", "boom")
    assert registry.get_last_error("p") == "boom"
    registry.set_engine_version("p", "v2")
    registry.set_device_mask("p", "0,1")
    registry.set_perf_hints("p", PerfHints(9.0))
    registry.set_health("p", HealthStatus(live=True, ready=True))
    assert (registry.get_heartbeat("p"), registry.get_engine_version("p"), registry.get_device_mask("p")) == (5, "v2", "0,1")
    assert registry.get_health("p") == HealthStatus(live=True, ready=True)
    found = registry.get("p")
    assert found is not None and found.perf_hints == PerfHints(9.0)
    registry.set_health("p", True)
    assert registry.get_health("p") == HealthStatus(live=True, ready=False)


def test_a_row_shows_its_model_its_leases_and_the_slots_that_they_leave(registry: Registry) -> None:
    registry.set_slots("p", 3, 3)
    registry.publish("p", model_id="m")
    registry.grant("p")
    row = registry.get("p")
    assert row is not None and (row.active_leases, row.slots_free, row.models_available) == (1, 2, ("m",))
    registry.register("q")
    bare = registry.get("q")
    assert bare is not None and bare.models_available == ()


def test_slots_are_updated_one_at_a_time(registry: Registry) -> None:
    registry.update("p", {"slots_total": 4, "slots_free": 2})
    registry.update("p", {"slots_total": 3})
    assert registry.get_slots("p") == (3, 2)
    registry.update("p", {"slots_free": 1})
    assert registry.get_slots("p") == (3, 1)


def test_a_handoff_with_slots_sets_them_and_a_mistyped_value_counts_as_absent(registry: Registry) -> None:
    registry.register_ready_from_handoff("p", {"slots_total": 4, "slots_free": 3, "engine_version": 5})
    assert registry.get_slots("p") == (4, 3) and registry.get_engine_version("p") is None
    registry.register_ready_from_handoff("q", {"slots_total": "4", "slots_free": 1})
    assert registry.get_slots("q") == (None, 1)


def test_a_refused_lease_says_what_to_do_and_whether_waiting_helps(registry: Registry) -> None:
    registry.set_slots("p", 0, 0)
    with pytest.raises(RequestError) as full:
        registry.grant("p")
    registry.set_draining("p", True)
    with pytest.raises(RequestError) as draining:
        registry.grant("p")
    for refused, retriable in ((full.value, True), (draining.value, False)):
        assert (refused.status, refused.pool_id, refused.retriable) == (409, "p", retriable) and refused.hint
    with pytest.raises(RequestError, match="not found on pool p") as missing:
        registry.renew("p", "x", None)
    assert (missing.value.code, missing.value.status, missing.value.pool_id) == ("LEASE_NOT_FOUND", 404, "p")
    assert registry.leases("unknown") == [] and registry.next_expiry("p", 0) is None


def test_the_same_request_has_the_same_lease_while_it_lasts(registry: Registry) -> None:
    registry.set_slots("p", 1, 1)
    lease = registry.grant("p", holder="h", key="request-1", expires_at=5.0)
    assert registry.grant("p", key="request-1") == lease and lease.given_at_ms == 0
    registry.release("p", lease.lease_id)
    assert registry.grant("p", key="request-1").lease_id != lease.lease_id


def test_every_change_of_a_lease_is_told_with_the_launch_that_it_is_on() -> None:
    told: list[LeaseChange] = []
    registry = Registry(clock_ms=lambda: 0, on_lease=told.append)
    registry.publish("p", epoch=3)
    first, second = registry.grant("p"), registry.grant("p")
    renewed = registry.renew("p", first.lease_id, 9.0)
    registry.release("p", first.lease_id)
    registry.deregister("p")
    assert told == [
        LeaseChange("p", 3, first.lease_id, first, new=True), LeaseChange("p", 3, second.lease_id, second, new=True),
        LeaseChange("p", 3, first.lease_id, renewed), LeaseChange("p", 3, first.lease_id, None),
        LeaseChange("p", 3, second.lease_id, None),
    ]  # fmt: skip


def test_leases_of_an_earlier_daemon_go_on_with_their_launch_and_no_id_is_given_twice() -> None:
    told: list[LeaseChange] = []
    registry = Registry(clock_ms=lambda: 0, on_lease=told.append)
    kept = KeptLeases("p", "a-b-1f", ((7, Lease("a-b-1e", "h")), (6, Lease("a-b-2"))))
    registry.publish("p", epoch=7)
    registry.restore_leases(kept, {7})
    assert registry.leases("p") == [Lease("a-b-1e", "h")]
    assert told == [LeaseChange("p", 6, "a-b-2", None)]
    assert registry.release("p", "a-b-2") == 1, "it was given once"
    assert registry.grant("p").lease_id == "a-b-20"
    assert registry.end_leases("p", 7) == 2


def test_every_change_has_a_revision_of_its_own(registry: Registry) -> None:
    seen = {registry.revision}
    lease = registry.grant("p")
    seen.add(registry.revision)
    registry.release("p", lease.lease_id)
    seen.add(registry.revision)
    registry.grant("p")
    registry.end_leases("p", 0)
    before = registry.revision
    assert registry.end_leases("p", 0) == 0 and registry.revision == before, "there was none to end"
    registry.deregister("p")
    assert len(seen) == 3 and registry.revision == before + 1
    registry.deregister("p")
    assert registry.revision == before + 1


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["grant", "release", "count", "uncount", "drain", "undrain", "end", "again"]), st.integers(0, 5)
        )
    )
)
def test_leases_stay_within_slots_in_any_order(moves: list[tuple[str, int]]) -> None:
    registry = Registry(clock_ms=lambda: 0, salt="s")
    registry.set_slots("p", 3, 3)
    given_ids: list[str] = []
    for move, n in moves:
        try:
            if move == "grant":
                given_ids.append(registry.grant("p").lease_id)
            elif move in ("release", "again") and given_ids:
                registry.release("p", given_ids[n % len(given_ids)])
            elif move == "count":
                registry.allocate_lease("p")
            elif move == "uncount":
                registry.release_lease("p")
            elif move == "end":
                registry.end_leases("p", 0)
            else:
                registry.set_draining("p", move == "drain")
        except RequestError as refused:
            assert refused.code in ("NO_FREE_SLOTS", "POOL_DRAINING")
        total, free = registry.get_slots("p")
        assert 0 <= registry.get_active_leases("p") <= 3
        assert total == 3 and free is not None and 0 <= free <= 3
    assert len(set(given_ids)) == len(given_ids), "ids are never used twice"


def test_leases_end_with_the_launch_they_were_given_on_and_with_no_other(registry: Registry) -> None:
    registry.set_slots("p", 2, None)
    registry.publish("p", epoch=1)
    old = registry.grant("p")
    registry.allocate_lease("p")
    registry.publish("p", epoch=2)
    new = registry.grant("p")
    assert registry.get_active_leases("p") == 3 and registry.get_slots("p") == (2, 1), "the new launch has slots of its own"
    assert registry.end_leases("p", 1) == 2
    assert registry.get_active_leases("p") == 1
    assert registry.renew("p", new.lease_id, 9.0).lease_id == new.lease_id
    with pytest.raises(RequestError):
        registry.renew("p", old.lease_id, 9.0)
    assert registry.end_leases("p", 1) == 0 and registry.get_active_leases("p") == 1, "late news of the old one"


def test_a_counted_lease_is_given_back_to_the_oldest_launch_first(registry: Registry) -> None:
    registry.publish("p", epoch=1)
    registry.allocate_lease("p")
    registry.publish("p", epoch=2)
    registry.allocate_lease("p")
    registry.release_lease("p")
    assert (registry.end_leases("p", 1), registry.end_leases("p", 2)) == (0, 1)
