"""What happened, once, for everybody: logs, metrics and the event stream all read from here."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import structlog

from pool_managerd.core.event import Event
from pool_managerd.core.narration import MAX_WORD_CHARS, bounded, shortened
from pool_managerd.core.redaction import Redactor
from pool_managerd.errors import PoolError
from pool_managerd.supervision.protocols import Journal

log = structlog.get_logger("pool_managerd.events")
KEPT = 2_000
KEPT_BYTES = 4 << 20
EVENT_BYTES = 16 << 10
OVERHEAD_BYTES = 500
DROPPED_AT_ONCE = 256
SUBSCRIBER_QUEUE = 1_000


class Subscription:
    """An async iterator over events, and a context manager that ends it.

    It ends when it or the node is closed. A reader that falls more than a thousand events behind is never waited for: its
    iteration ends, too, and ``lost`` is true then; a new subscription after the last id goes on.
    """

    def __init__(self, backlog: list[Event], forget: Callable[[Subscription], None], pool_id: str | None = None) -> None:
        self.lost = False
        self._pool_id = pool_id
        self._queue: deque[Event] = deque(backlog)
        self._limit = len(backlog) + SUBSCRIBER_QUEUE
        self._forget = forget
        self._wake = asyncio.Event()
        self.closed = False

    def offer(self, event: Event) -> None:
        """For the node: one more event."""
        if self._pool_id not in (None, event.pool_id):
            return
        if len(self._queue) >= self._limit:
            self.lost = True
            self.close()
            return
        self._queue.append(event)
        self._wake.set()

    def close(self) -> None:
        """Nothing more comes."""
        self.closed = True
        self._forget(self)
        self._wake.set()

    def __enter__(self) -> Subscription:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __aiter__(self) -> Subscription:
        return self

    async def __anext__(self) -> Event:
        while not self._queue:
            if self.closed:
                raise StopAsyncIteration
            self._wake.clear()
            await self._wake.wait()
        return self._queue.popleft()


class EventLog:
    """The newest events in memory, with listeners (called at once) and subscriptions (queues).

    With a ``journal`` the next daemon goes on with them, and with their ids.
    """

    def __init__(self, clock_ms: Callable[[], int], redactor: Redactor | None = None, journal: Journal | None = None) -> None:
        self._clock_ms = clock_ms
        self.redactor = redactor or Redactor()
        self.state_trouble: str | None = None
        """Why changes cannot be made durable now; None when they can."""
        self.journal = journal
        self._last_id = 0
        self._forgotten_id = 0
        self._dropped_id = 0
        self._kept: deque[Event] = deque()
        self._sizes: deque[int] = deque()
        self._bytes = 0
        self._listeners: list[Callable[[Event], None]] = []
        self._subscriptions: list[Subscription] = []

    def restore(self) -> None:
        """Open the journal, inside the node's loop, and go on behind what it holds of earlier daemons."""
        if self.journal is None:
            return
        self.journal.open(self.from_threads())
        for event in self.journal.recall_events():
            self._keep(event, bounded(event.fields, EVENT_BYTES)[1] + len(event.human) + OVERHEAD_BYTES)
        self._last_id = self.journal.last_id
        self._forgotten_id = self._kept[0].id - 1 if self._kept else self._last_id

    def from_threads(self) -> Callable[[str, str], None]:
        """What any thread may tell with: a sentence and its level, as a notice of this loop."""
        loop = asyncio.get_running_loop()

        def tell(human: str, level: str) -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody is left to tell
                loop.call_soon_threadsafe(partial(self.emit, "notice", human, level=level))

        return tell

    def emit(
        self, type_: str, human: str, *, level: str = "info", pool_id: str | None = None, journal: bool = True, **fields: Any
    ) -> Event:
        self._last_id += journal
        size = 0
        if journal:  # what is told and kept: without secrets, and of a size that can be kept
            human = self.clean(human)
            fields, size = bounded(self.redactor.mapping(fields), EVENT_BYTES)
        event = Event(self._last_id, self._clock_ms(), type_, level, pool_id, human, fields, journal)
        for listener in tuple(self._listeners):
            try:
                listener(event)
            except Exception:
                log.exception("A listener of events failed", action="listener_failed")
        if journal:
            self._keep(event, size + len(human) + OVERHEAD_BYTES)
            if self.journal is not None:
                self.journal.put_event(event)
            for subscription in tuple(self._subscriptions):
                subscription.offer(event)
        return event

    def clean(self, text: str) -> str:
        """``text`` as it may be told: no secrets, no endless words."""
        text = self.redactor.text(text)
        return text if len(text) <= MAX_WORD_CHARS else shortened(text)

    def fault(self, doing: str, problem: Exception, pool_id: str | None = None) -> PoolError:
        """A fault of our own ``doing`` something ("while pool 'p' was reloaded"), told; the error for whoever waits."""
        human = f"Internal error {doing}: {problem!r}"
        self.emit("internal_error", human, level="critical", pool_id=pool_id)
        return PoolError(human, pool_id=pool_id)

    def clean_error(self, problem: PoolError) -> PoolError:
        """``problem`` itself, as it may be told."""
        self.redactor.error(problem)
        problem.message = shortened(problem.message)
        problem.args = (problem.message,)
        problem.details = bounded(problem.details, EVENT_BYTES)[0]
        return problem

    def _keep(self, event: Event, size: int) -> None:
        self._kept.append(event)
        self._sizes.append(size)
        self._bytes += size
        while len(self._kept) > KEPT or self._bytes > KEPT_BYTES:
            self._forgotten_id = self._kept.popleft().id
            self._bytes -= self._sizes.popleft()
        if self.journal is not None and self._forgotten_id >= self._dropped_id + DROPPED_AT_ONCE:
            self._dropped_id = self._forgotten_id
            self.journal.drop_events(self._dropped_id)

    def listen(self, listener: Callable[[Event], None]) -> Callable[[], None]:
        """Call ``listener`` for every event, quiet ones included; the returned function ends that."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    def subscribe(self, after_id: int | None = None, pool_id: str | None = None) -> Subscription:
        """Events newer than ``after_id``, then everything to come. 0: from the oldest that is kept; None: what is to come alone.

        When not everything since ``after_id`` is kept, a ``gap`` comes first and what is kept follows. ``pool_id``: those of one
        pool alone.
        """
        kept: list[Event] = []
        if after_id is not None:
            gap = self._gap(after_id)
            kept = [event for event in self._kept if gap is not None or event.id > after_id]
        else:
            gap = None
        backlog = [event for event in kept if pool_id in (None, event.pool_id)]
        if gap is not None:
            backlog.insert(0, gap)
        subscription = Subscription(backlog, self._drop, pool_id)
        self._subscriptions.append(subscription)
        return subscription

    def _gap(self, after_id: int) -> Event | None:
        """What tells a reader that it has missed events; it has the id behind which those that are kept begin."""
        if after_id == 0 or self._forgotten_id <= after_id <= self._last_id:
            return None
        oldest = self._kept[0].id if self._kept else self._last_id + 1
        missing = (
            f"Events after {after_id} are not all kept" if after_id <= self._last_id else f"Event {after_id} is not known here"
        )
        human = f"{missing}; the oldest that is kept is {oldest}"
        fields = {"after_id": after_id, "oldest_id": oldest}
        return Event(self._forgotten_id, self._clock_ms(), "gap", "warn", None, human, fields)

    def recent(self, type_: str, pool_id: str | None = None) -> list[Event]:
        """Kept events of one type, oldest first."""
        return [event for event in self._kept if event.type == type_ and pool_id in (None, event.pool_id)]

    def close(self) -> None:
        for subscription in tuple(self._subscriptions):
            subscription.close()

    def _drop(self, subscription: Subscription) -> None:
        if subscription in self._subscriptions:
            self._subscriptions.remove(subscription)
