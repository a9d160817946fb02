"""The control API between a simulated gateway and whichever daemon runs: what is asked and answered takes a moment, and is lost
with either end of the connection.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import Any

from pool_managerd.core.demand.request import AcquireRequest
from pool_managerd.errors import PoolError
from pool_managerd.gateway.node_link import SILENCE_S, NodeLink
from pool_managerd.node import PoolManager
from pool_managerd.testing.scene import Scene
from pool_managerd.testing.simulated_demand import Demand

LOST = 0.01
"""This share of answers never arrives, though the daemon has done its part."""
Answer = tuple[int, Any]


@dataclass(eq=False)
class Call:
    """One exchange. ``there_s`` and ``back_s``: how long the question and the answer take; ``lost``: the answer does not come.

    ``heard``: whoever asked has it.
    """

    method: str
    path: str
    body: Any
    answer: asyncio.Future[Answer]
    there_s: float
    back_s: float
    lost: bool
    task: asyncio.Task[Any] | None = None
    heard: bool = False

    @property
    def model(self) -> str | None:
        """What a slot is wanted of."""
        return self.body["model"] if self.path == "acquire" else None

    @property
    def evicts(self) -> bool:
        """A pool is to end."""
        return "/evict" in self.path


@dataclass(eq=False)
class Stream:
    """``told_at`` is when the last piece arrives: none overtakes another one."""

    pieces: asyncio.Queue[dict[str, Any] | OSError]
    back_s: float
    told_at: float = 0.0
    task: asyncio.Task[Any] | None = None


class SimulatedLink(NodeLink):
    """As ``NodeLink``, but for its connections. ``on_lost`` hears of leases whose gateway has not."""

    def __init__(self, scene: Scene, chance: Random, demand: Demand, on_lost: Callable[[str], None]) -> None:
        super().__init__("http://simulated", lambda: None)
        self._scene, self._chance, self._demand, self._on_lost = scene, chance, demand, on_lost
        self._calls: dict[Call, None] = {}
        self._streams: dict[Stream, None] = {}

    async def __aenter__(self) -> SimulatedLink:
        return self

    # --- calls ---

    async def _exchange(self, method: str, path: str, body: Any, timeout_s: float | None, *, waits: bool) -> Answer:
        loop, timeline = asyncio.get_running_loop(), self._scene.timeline
        call = Call(method, path, body, loop.create_future(), self._moment(), self._moment(), self._chance.random() < LOST)
        self._calls[call] = None
        timeline.after(call.there_s, self._arrive, call)
        try:
            async with asyncio.timeout(timeout_s):
                told = await call.answer
                call.heard = True
                return told
        finally:
            if not call.answer.done() or call.answer.cancelled():
                timeline.after(call.there_s, self._go_away, call)
            elif not call.heard:  # it was broken off just as the answer came
                self._lose(call)

    def _moment(self) -> float:
        return 0.0002 + 0.02 * self._chance.random() ** 4

    def _arrive(self, call: Call) -> None:
        scene = self._scene
        if scene.node is None or scene.life is None:
            self._break(call, ConnectionRefusedError("Connection refused"))
            return
        self._demand.begins(call.model, evicts=call.evicts)
        call.task = scene.life.loop.create_task(self._work(scene.node, call))
        call.task.add_done_callback(partial(self._done, call))

    async def _work(self, node: PoolManager, call: Call) -> Any:
        """As the routes of the API do it."""
        match call.method, *call.path.partition("?")[0].split("/"):
            case "POST", "acquire":
                asked = call.body
                return await node.take_slot(
                    AcquireRequest(asked["model"], asked.get("wait_ms"), asked["ttl_ms"], holder=asked["holder"])
                )
            case "DELETE", "pools", pool_id, "leases", lease_id:
                return await node.give_lease_back(pool_id, lease_id)
            case "PUT", "pools", pool_id, "leases", lease_id:
                return await node.prolong_lease(pool_id, lease_id, call.body["ttl_ms"])
            case "POST", "pools", pool_id, "evict":
                return await (await node.evict(pool_id)).wait()
            case "GET", "queue":
                return node.queue()
            case "GET", "pools":
                return [{"pool_id": pool_id} for pool_id in node.pool_ids()]
            case "GET", "pools", pool_id, "leases":
                return node.leases(pool_id)
            case other:
                raise LookupError(f"{other}")

    def _go_away(self, call: Call) -> None:
        """The daemon sees that nobody waits for its answer, once it runs."""
        self._calls.pop(call, None)
        if call.task is not None and not call.task.done() and self._scene.is_alive(call.task):
            call.task.get_loop().call_soon(call.task.cancel)

    def _done(self, call: Call, task: asyncio.Task[Any]) -> None:
        self._demand.ends(call.model, evicts=call.evicts)
        if task.cancelled():
            self._break(call, ConnectionResetError("Connection reset by peer"))
            return
        error = task.exception()
        if error is not None and not isinstance(error, PoolError):
            self._scene.fail("a request ends with an answer or a PoolError", f"{call.method} {call.path}: {error!r}")
            return
        if call.lost:
            self._lose(call)
            self._break(call, ConnectionResetError("Connection reset by peer"))
            return
        told = (200, task.result()) if error is None else (error.status, _shown(error))
        self._scene.timeline.after(call.back_s, self._deliver, call, json.loads(json.dumps(told, default=str)))

    def _deliver(self, call: Call, told: tuple[int, Any]) -> None:
        self._calls.pop(call, None)
        if call.answer.done() or call.answer.get_loop().is_closed():
            self._lose(call)
        else:
            call.answer.set_result((told[0], told[1]))

    def _lose(self, call: Call) -> None:
        task = call.task
        if call.path == "acquire" and task is not None and task.done() and not task.cancelled() and task.exception() is None:
            self._on_lost(task.result()["lease_id"])

    def _break(self, call: Call, problem: OSError) -> None:
        self._scene.timeline.after(call.back_s, self._broken, call, problem)

    def _broken(self, call: Call, problem: OSError) -> None:
        self._calls.pop(call, None)
        if not call.answer.done():
            call.answer.set_exception(problem)

    # --- the stream of routes ---

    async def routes(self) -> AsyncIterator[dict[str, Any]]:
        stream, there_s = Stream(asyncio.Queue(), self._moment()), self._moment()
        self._streams[stream] = None
        self._scene.timeline.after(there_s, self._open_stream, stream)
        try:
            while not isinstance(piece := await stream.pieces.get(), OSError):
                yield piece
            raise self._unreachable(piece) from piece
        finally:
            self._streams.pop(stream, None)
            self._scene.timeline.after(there_s, self._leave, stream)

    def _open_stream(self, stream: Stream) -> None:
        scene = self._scene
        if scene.node is None or scene.life is None:
            self._tell(stream, ConnectionRefusedError("Connection refused"))
            return
        stream.task = scene.life.loop.create_task(self._follow(scene.node, stream))
        self._look_for_silence(stream)

    async def _follow(self, node: PoolManager, stream: Stream) -> None:
        async for told in node.watch_routes():
            self._tell(stream, json.loads(json.dumps(told)))

    def _tell(self, stream: Stream, piece: dict[str, Any] | OSError) -> None:
        stream.told_at = max(stream.told_at, self._scene.timeline.now + stream.back_s * self._chance.random())
        self._scene.timeline.at(stream.told_at, stream.pieces.put_nowait, piece)

    def _leave(self, stream: Stream) -> None:
        if stream.task is not None and self._scene.is_alive(stream.task):
            stream.task.get_loop().call_soon(stream.task.cancel)

    # --- what becomes of the other end ---

    def daemon_died(self) -> None:
        """Its connections are reset."""
        for call in list(self._calls):
            if call.task is not None:
                self._break(call, ConnectionResetError("Connection reset by peer"))
        for stream in list(self._streams):
            if stream.task is not None:
                self._tell(stream, ConnectionResetError("Connection reset by peer"))

    def daemon_pauses(self) -> None:
        """It shows no signs of life."""
        for stream in list(self._streams):
            self._look_for_silence(stream)

    def _look_for_silence(self, stream: Stream) -> None:
        timeline = self._scene.timeline
        if self._scene.resumed_at > timeline.now + SILENCE_S:
            timeline.after(SILENCE_S, self._tell, stream, TimeoutError("nothing was heard"))

    def process_died(self) -> None:
        """The gateway's own end closes all."""
        for call in list(self._calls):
            self._scene.timeline.after(call.there_s, self._go_away, call)
        for stream in list(self._streams):
            self._scene.timeline.after(stream.back_s, self._leave, stream)


def _shown(error: PoolError) -> dict[str, Any]:
    """As the API shows it."""
    return {
        "code": error.code, "message": error.message, "hint": error.hint, "pool_id": error.pool_id,
        "retriable": error.retriable, "retry_after_ms": error.retry_after_ms,
    }  # fmt: skip
