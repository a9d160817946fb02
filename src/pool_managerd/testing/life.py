"""One daemon's life on a simulated machine.

A daemon that is killed is cut off from machine and disk at that instant: whatever its tasks would still do on their way out
happens to copies that nobody looks at.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from random import Random
from typing import Any, TypeVar

from pool_managerd.testing.simulated_disk import SimulatedDisk
from pool_managerd.testing.simulated_machine import SimulatedMachine
from pool_managerd.testing.timeline import Timeline
from pool_managerd.testing.virtual_loop import VirtualLoop

_T = TypeVar("_T")


class Life:
    """One daemon, from its start to its end: its loop, and the machine and the disk that it acts on."""

    def __init__(self, number: int, machine: SimulatedMachine, disk: SimulatedDisk, order: Random) -> None:
        self.number, self.machine, self.disk = number, machine, disk
        timeline = machine.timeline
        self.loop = VirtualLoop(lambda: timeline.now, order)  # type: ignore[abstract]  # it has nothing of what reads and writes
        self.alive = True

    def end(self) -> None:
        """It is killed: from here on nothing of it has any effect."""
        self.alive = False
        now = self.machine.timeline.now
        self.machine, self.disk = SimulatedMachine(Timeline(), Random(0)), SimulatedDisk()
        self.machine.timeline.now = now
        self.loop.end()

    def later(self, seconds: float, call: Callable[[], None]) -> None:
        """Call it as a thread of the daemon would: not at all once it was killed."""
        self.machine.timeline.after(seconds, lambda: call() if self.alive else None)

    async def pass_time(self, low_s: float, high_s: float) -> None:
        """Something that takes a moment, outside of the loop."""
        await asyncio.sleep(self.machine.soon(low_s, high_s))

    # --- for whoever plays without a scenario ---

    def start(self, work: Coroutine[Any, Any, _T]) -> asyncio.Task[_T]:
        """Run ``work`` in the daemon's loop; nothing happens before ``run_for``."""
        return self.loop.create_task(work)

    def run_for(self, seconds: float) -> None:
        """Let so much time pass, with all that happens in it."""
        timeline = self.machine.timeline
        ends = timeline.now + seconds
        while (at := min((t for t in (timeline.next_at(), self.loop.next_at()) if t is not None), default=ends)) <= ends:
            timeline.now = max(timeline.now, at)
            while timeline.happen():
                pass
            if not self.loop.turn() and at == ends:
                break
        timeline.now = ends
