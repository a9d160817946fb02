"""What happens to models below, told as the node's events."""

from __future__ import annotations

from collections.abc import Callable

from pool_managerd.core.narration import duration, size
from pool_managerd.models.told import Downloaded, Verified
from pool_managerd.supervision.event_log import EventLog


def telling(events: EventLog) -> Callable[[Downloaded | Verified], None]:
    """Takes what happens to a model, in the event loop."""

    def tell(what: Downloaded | Verified) -> None:
        took_ms, model_id = round(what.duration_s * 1000), what.ref.partition("?")[0]  # behind it may be what gives access
        if isinstance(what, Verified):
            human = f"The model {model_id} {'is' if what.result == 'pass' else 'is not'} what it has to be"
            events.emit(
                "model_verified", human, level="debug" if what.result == "pass" else "warn", model_id=model_id,
                result=what.result, reason=what.reason, duration_ms=took_ms,
            )  # fmt: skip
            return
        how = {"success": "is complete", "cancelled": "was broken off"}.get(what.outcome, f"failed ({what.reason})")
        human = f"The download of {model_id} {how}: {size(what.received)} in {duration(what.duration_s)}"
        events.emit(
            "download", human, level="warn" if what.outcome == "error" else "info", model_id=model_id,
            outcome=what.outcome, reason=what.reason, bytes=what.received, duration_ms=took_ms,
        )  # fmt: skip

    return tell
