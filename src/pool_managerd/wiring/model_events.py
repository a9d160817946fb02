"""What happens to models below, told as the node's events."""

from __future__ import annotations

from collections.abc import Callable

from pool_managerd.core.narration import duration, size
from pool_managerd.models.told import Downloaded, Verified
from pool_managerd.supervision.event_log import EventLog


def telling(events: EventLog) -> Callable[[Downloaded | Verified], None]:
    """Takes what happens to a model, in the event loop."""

    def tell(what: Downloaded | Verified) -> None:
        took_ms = round(what.duration_s * 1000)
        if isinstance(what, Verified):
            human = f"The model {what.ref} {'is' if what.result == 'pass' else 'is not'} what it has to be"
            events.emit(
                "model_verified", human, level="debug" if what.result == "pass" else "warn", model_id=what.ref,
                result=what.result, reason=what.reason, duration_ms=took_ms,
            )  # fmt: skip
            return
        how = {"success": "is complete", "cancelled": "was broken off"}.get(what.outcome, f"failed ({what.reason})")
        human = f"The download of {what.ref} {how}: {size(what.received)} in {duration(what.duration_s)}"
        events.emit(
            "download", human, level="warn" if what.outcome == "error" else "info", model_id=what.ref,
            outcome=what.outcome, reason=what.reason, bytes=what.received, duration_ms=took_ms,
        )  # fmt: skip

    return tell
