"""The registry by the names the seeds fix (ORCH-3501..3505, B-REG-*)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pool_managerd.core.health import HealthStatus
from pool_managerd.core.registry import Registry
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


def test_leases_expire_by_the_clock_they_are_given(registry: Registry) -> None:
    registry.grant("p", expires_at=10.0)
    kept = registry.grant("p", expires_at=20.0)
    assert registry.next_expiry("p") == 10.0
    assert len(registry.expire("p", 10.0)) == 1
    registry.renew("p", kept.lease_id, 30.0)
    assert registry.next_expiry("p") == 30.0
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
