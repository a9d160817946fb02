"""What is known of sessions, bounded."""

from __future__ import annotations

from pool_managerd.core.demand.sessions import Sessions


def test_the_pool_that_served_a_session_last_is_known() -> None:
    found = Sessions()
    found.served(b"a", "m")
    found.served(b"a", "n")
    assert found.last(b"a") == "n" and found.last(b"b") is None and len(found) == 1


def test_of_too_many_the_one_that_was_served_longest_ago_is_forgotten() -> None:
    found = Sessions(most=2)
    for session in (b"a", b"b", b"a", b"c"):
        found.served(session, "m")
    assert found.last(b"b") is None and found.last(b"a") == found.last(b"c") == "m" and len(found) == 2
