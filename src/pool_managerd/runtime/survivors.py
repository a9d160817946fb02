"""Engines of a daemon that died: found by identity, never by pid alone, and stopped through their shim."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pool_managerd.runtime import procfs
from pool_managerd.runtime.identity import Identity, open_proved
from pool_managerd.runtime.records import InstanceRecord, InstanceRecords
from pool_managerd.runtime.strays import kill_strays
from pool_managerd.runtime.waiting import ended_within, has_ended, send

# A shim that was told to kill gives leftovers 5 s and then writes its record.
_SHIM_SECONDS = 8.0
_ENGINE_SECONDS = 2.0

Outcome = Literal["stopped", "killed", "gone", "not ours"]


@dataclass(frozen=True, slots=True)
class Survivor:
    """What became of one engine of a dead predecessor; ``human`` says it in a sentence."""

    identity: Identity
    outcome: Outcome
    human: str

    @property
    def pool_id(self) -> str:
        return self.identity.pool_id

    @property
    def pid(self) -> int:
        return self.identity.pid


async def stop_survivors(records: Iterable[Identity], grace_ms: int) -> list[Survivor]:
    """Stop every recorded engine that still runs, all at once, and the processes that they left behind.

    SIGTERM comes first; what is there after ``grace_ms`` is killed. A record of another boot or a reused pid is
    reported as gone and nothing is signalled. The result is in the order of ``records``; it takes at most
    ``grace_ms`` and about ten seconds more. The records themselves stay: they are the caller's to forget.
    """
    return list(await asyncio.gather(*(_stop(identity, grace_ms) for identity in records)))


async def _stop(identity: Identity, grace_ms: int) -> Survivor:
    if not identity.is_this_boot():
        return _survivor(identity, "gone", "it belongs to an earlier boot of this machine")
    recorded = _record_of(identity).descendants
    with _hold(identity.shim_pid, identity.shim_runs) as shim, _hold(identity.pid, identity.engine_runs) as engine:
        if shim is None and engine is None:
            strays = await kill_strays(identity, recorded)
            if not strays:
                return _absent(identity)
            return _survivor(identity, "killed", f"it had ended, but left {len(strays)} processes behind, which were killed")
        killed = False
        if shim is not None:
            killed = await _stop_through_shim(shim, identity, grace_ms)
        if engine is not None and not has_ended(engine):
            killed = await _stop_directly(engine, grace_ms if shim is None else 0)
        strays = await kill_strays(identity, recorded)
        stuck = engine is not None and not has_ended(engine)
    if stuck:
        return _survivor(identity, "killed", "it was killed but is still there, stuck in the kernel")
    also = f"; so were {len(strays)} processes that it had left behind" if strays else ""
    if killed:
        return _survivor(identity, "killed", f"it did not end within {grace_ms} ms of SIGTERM and was killed{also}")
    return _survivor(identity, "stopped", f"it was stopped{also}")


async def _stop_through_shim(shim: int, identity: Identity, grace_ms: int) -> bool:
    """True when it took a SIGKILL. The shim's own ladder may be shorter than ``grace_ms``, never longer."""
    send(shim, signal.SIGTERM)
    send(shim, signal.SIGCONT)
    if await ended_within(shim, grace_ms / 1000):
        ending = _record_of(identity).exit
        return ending is not None and ending.signal == signal.SIGKILL
    send(shim, signal.SIGUSR1)
    if not await ended_within(shim, _SHIM_SECONDS):
        send(shim, signal.SIGKILL)  # the engine dies with it
    return True


async def _stop_directly(engine: int, grace_ms: int) -> bool:
    """For an engine whose shim is gone; True when it took a SIGKILL."""
    if grace_ms > 0:
        send(engine, signal.SIGTERM)
        send(engine, signal.SIGCONT)
        if await ended_within(engine, grace_ms / 1000):
            return False
    send(engine, signal.SIGKILL)
    await ended_within(engine, _ENGINE_SECONDS)
    return True


@contextmanager
def _hold(pid: int, is_ours: Callable[[], bool]) -> Iterator[int | None]:
    """As ``open_proved``, and closed in the end."""
    pidfd = open_proved(pid, is_ours)
    try:
        yield pidfd
    finally:
        if pidfd is not None:
            os.close(pidfd)


def _record_of(identity: Identity) -> InstanceRecord:
    return InstanceRecords(Path(identity.record_path).parent).of(identity)


def _absent(identity: Identity) -> Survivor:
    ticks = procfs.start_ticks(identity.pid) if identity.pid > 1 else None
    if ticks is not None and ticks != identity.start_ticks:
        return _survivor(identity, "gone", "it had ended, and its pid is another process's now, which was left alone")
    if ticks is not None and procfs.is_running(identity.pid, ticks):
        return _survivor(identity, "not ours", "nothing proves that the process with its pid is its own, so it was left alone")
    return _survivor(identity, "gone", "it had ended already")


def _survivor(identity: Identity, outcome: Outcome, human: str) -> Survivor:
    return Survivor(identity, outcome, f"Engine of pool '{identity.pool_id}' (pid {identity.pid}): {human}")
