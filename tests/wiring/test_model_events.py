"""What happens to models is an event of the node, without what is behind the ? of an address."""

from __future__ import annotations

import pytest

from pool_managerd.core.event import Event
from pool_managerd.models.told import Downloaded, Verified
from pool_managerd.supervision.event_log import EventLog
from pool_managerd.wiring.model_events import telling

REF = "https://models.example/m.gguf?signature=secret"


@pytest.mark.parametrize(
    ("what", "type_", "level", "human"),
    [
        (Downloaded(REF, "success", "none", 1 << 20, 4), "download", "info", "is complete: 1 MiB in 4 s"),
        (Downloaded(REF, "cancelled", "none", 0, 4), "download", "info", "was broken off: 0 in 4 s"),
        (Downloaded(REF, "error", "fetch_failed", 7, 4), "download", "warn", "failed (fetch_failed): 7 B in 4 s"),
        (Verified(REF, "pass", "start", 1.5), "model_verified", "debug", "is what it has to be"),
        (Verified(REF, "fail", "verify", 1.5), "model_verified", "warn", "is not what it has to be"),
    ],
)
def test_each_is_told_by_what_it_came_to(what: Downloaded | Verified, type_: str, level: str, human: str) -> None:
    events, told = EventLog(lambda: 1), list[Event]()
    events.listen(told.append)
    telling(events)(what)
    (event,) = told
    assert (event.type, event.level, event.fields["model_id"]) == (type_, level, "https://models.example/m.gguf")
    assert event.human.endswith(human) and "secret" not in f"{event.human}{event.fields}"
