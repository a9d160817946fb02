"""The spans of what a node does: launches, drains and reloads by its events, and acquires. Imported only where it traces.

An event is told in the context of whoever caused it: what a request has led to is a part of that request's trace. Nothing of an
event goes into a span but names, numbers and classes: its sentences may quote engines.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass
from typing import Any

from opentelemetry.context import Context
from opentelemetry.trace import Span, SpanKind, get_current_span, set_span_in_context

from pool_managerd.core.event import Event
from pool_managerd.errors import PoolError
from pool_managerd.telemetry.spans import CANCELLED, POOL_ID, failed, refused, text, tracer

_BEGINS: Mapping[str, str] = {
    "start": "launch", "restart": "launch", "drain_started": "drain", "reload_started": "reload",
}  # fmt: skip
_STAGES: Mapping[str, str] = {
    "start": "stage", "restart": "stage", "staged": "spawn", "attach": "attach", "spawn": "load", "warming": "warm up",
}  # fmt: skip
"""Which part of a launch begins with an event; the one before it ends then."""
_ENDS: Mapping[str, str] = {
    "preload_succeeded": "launch", "preload_failed": "launch", "crash": "launch", "exit": "launch", "quarantine": "launch",
    "stopped": "launch", "port_conflict": "launch",
    "drain_finished": "drain", "undrain": "drain",
    "reload_succeeded": "reload", "reload_failed": "reload",
}  # fmt: skip
_GIVEN_UP = frozenset({"stopped", "undrain"})
_TEXTS = ("engine", "engine_version", "model_id", "device_mask", "replica_id", "origin", "reason", "signal", "outcome")
"""Fields of events whose values are names; all numbers are taken, too."""
_CLASSES = ("crash_class", "reason")
Key = tuple[str, str, str]


@dataclass(slots=True)
class _Running:
    """``stage`` is the part of a launch that is under way."""

    span: Span
    stage: Span | None = None
    stage_name: str = ""


class NodeSpans:
    """Of one node. ``hear`` is a listener of its events."""

    def __init__(self) -> None:
        self._tracer = tracer()
        self._running: dict[Key, _Running] = {}

    async def acquired(self, model: str, work: Coroutine[Any, Any, dict[str, Any]]) -> dict[str, Any]:
        """``work``, which is a lease of ``model``; the starts that it leads to are parts of it."""
        kind = SpanKind.SERVER if get_current_span().get_span_context().is_remote else SpanKind.INTERNAL
        asked = {"gen_ai.request.model": text(model)}
        with self._tracer.start_as_current_span(
            "acquire", kind=kind, attributes=asked, record_exception=False, set_status_on_exception=False
        ) as span:  # fmt: skip
            try:
                given = await work
            except PoolError as problem:
                refused(span, problem)
                raise
            except asyncio.CancelledError:
                failed(span, CANCELLED, error=False)
                raise
            known = {name: given[name] for name in ("started", "queued_ms") if name in given}
            span.set_attributes({f"pool_managerd.{name}": value for name, value in known.items()})
            span.set_attribute(POOL_ID, given.get("pool_id", ""))
            return given

    def hear(self, event: Event) -> None:
        """What begins, goes on or ends with it."""
        if event.pool_id is None or not event.journal:
            return
        replica = str(event.fields.get("replica_id", ""))
        if (ends := _ENDS.get(event.type)) is not None:
            self._end((event.pool_id, ends, "" if ends == "reload" else replica), event)
        if (begins := _BEGINS.get(event.type)) is not None:
            self._begin((event.pool_id, begins, "" if begins == "reload" else replica), event)
        launch = self._running.get((event.pool_id, "launch", replica))
        if launch is not None:
            self._goes_on(launch, event)

    def close(self) -> None:
        """The node ends: what is under way is not seen to its end here."""
        for running in self._running.values():
            _ended(running, "node_closed", error=False)
        self._running.clear()

    # --- inside ---

    def _begin(self, key: Key, event: Event) -> None:
        if (before := self._running.pop(key, None)) is not None:
            _ended(before, CANCELLED, error=False)
        reload = self._running.get((key[0], "reload", ""))
        parent = None if reload is None else set_span_in_context(reload.span, Context())
        attributes = {POOL_ID: key[0], **_told(event)}
        self._running[key] = _Running(self._tracer.start_span(key[1], parent, attributes=attributes))

    def _goes_on(self, launch: _Running, event: Event) -> None:
        stage = _STAGES.get(event.type, launch.stage_name)
        if stage != launch.stage_name:
            if launch.stage is not None:
                launch.stage.end()
            launch.stage, launch.stage_name = self._tracer.start_span(stage, set_span_in_context(launch.span, Context())), stage
        elif launch.stage is not None:
            launch.stage.add_event(event.type, _told(event))

    def _end(self, key: Key, event: Event) -> None:
        running = self._running.pop(key, None)
        if running is None:
            return
        running.span.set_attributes(_told(event))
        if event.type in _GIVEN_UP:
            _ended(running, CANCELLED, error=False)
        elif event.level in ("error", "critical") or event.type == "port_conflict":
            why = next((str(event.fields[name]) for name in _CLASSES if event.fields.get(name)), event.type)
            _ended(running, why)
        else:
            _ended(running)


def _ended(running: _Running, why: str | None = None, *, error: bool = True) -> None:
    for span in (running.stage, running.span):
        if span is not None:
            if why is not None:
                failed(span, why, error=error)
            span.end()


def _told(event: Event) -> dict[str, str | int | float]:
    names = {name: text(str(event.fields[name])) for name in _TEXTS if event.fields.get(name)}
    numbers = {name: value for name, value in event.fields.items() if isinstance(value, int | float)}
    return {f"pool_managerd.{name}": value for name, value in (names | numbers).items()}
