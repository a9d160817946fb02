"""The spans of a node, where its process traces."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pool_managerd.supervision.event_log import EventLog
from pool_managerd.telemetry import tracing

if TYPE_CHECKING:
    from pool_managerd.telemetry.node_spans import NodeSpans


def node_spans(events: EventLog) -> NodeSpans | None:
    """They follow ``events`` from now on. None where nothing is traced: what makes spans is not imported then."""
    if not tracing.is_on():
        return None
    from pool_managerd.telemetry.node_spans import NodeSpans

    spans = NodeSpans()
    events.listen(spans.hear)
    return spans
