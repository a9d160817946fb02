"""What happened, as one value for everybody."""

from __future__ import annotations

from pool_managerd.core.event import Event


def test_an_events_fields_stand_beside_what_every_event_has_and_never_in_its_place() -> None:
    event = Event(7, 1000, "crash", "error", "p", "It crashed", {"exit_code": 1, "type": "another"})
    assert event.to_dict() == {
        "id": 7, "ts_ms": 1000, "type": "crash", "level": "error", "pool_id": "p", "human": "It crashed", "exit_code": 1,
    }  # fmt: skip
