"""Putting one engine to sleep and waking it, started by effects: the outcome is an event.

The engine says when it is asleep. That its memory is free then is seen by whoever wants that memory.
"""

from __future__ import annotations

import asyncio

import aiohttp

from pool_managerd.core.lifecycle import Desired
from pool_managerd.core.lifecycle import effects as do
from pool_managerd.core.lifecycle import events as ev
from pool_managerd.core.narration import duration
from pool_managerd.errors import EngineError
from pool_managerd.supervision.asleep import dialect_of, is_asleep, url_of
from pool_managerd.supervision.in_flight import a_moment
from pool_managerd.supervision.pool import Pool
from pool_managerd.supervision.reports import Reports
from pool_managerd.supervision.services import Services

_FREES_S = 5.0
"""Memory is given back a moment after an engine says that it sleeps."""


class NoRoomError(EngineError):
    """It cannot wake where it sleeps."""


async def sleep_work(effect: do.SleepEngine | do.WakeEngine, pool: Pool, actor: Reports, services: Services) -> None:
    """One after the other on each GPU."""
    async with services.gpus.turn(pool.launch.device_uuids):
        try:
            if isinstance(effect, do.SleepEngine):
                await _put_to_sleep(pool, services)
                if pool.state.desired is Desired.EVICTED:
                    await _leave_memory(pool, services, effect.epoch)
                actor.post(ev.Slept(effect.epoch))
            else:
                await _wake(pool, services)
                actor.post(ev.Woke(effect.epoch))
        except NoRoomError as problem:
            actor.post(ev.NoRoomToWake(effect.epoch, problem.message))
        except EngineError as problem:
            failed = ev.SleepFailed if isinstance(effect, do.SleepEngine) else ev.HelperDied
            actor.post(failed(effect.epoch, problem.message))


def _why(problem: Exception) -> str:
    """A ValueError is what it has answered."""
    said = str(problem) or type(problem).__name__
    return f"it was asked to and would not: {said}" if isinstance(problem, ValueError) else f"it could not be asked to: {said}"


async def _put_to_sleep(pool: Pool, services: Services) -> None:
    """Raises EngineError."""
    dialect, limit_s = dialect_of(pool), pool.definition.policy.sleep_timeout_s
    try:
        async with asyncio.timeout(limit_s):
            if dialect.sleep is not None:
                await services.prober.ask(url_of(pool), dialect.sleep)
            while not await is_asleep(pool, services):
                await a_moment(services)
    except TimeoutError:
        raise EngineError(f"it did not fall asleep within {duration(limit_s)}") from None
    except (aiohttp.ClientError, OSError, ValueError) as problem:
        raise EngineError(_why(problem)) from problem


async def _leave_memory(pool: Pool, services: Services, epoch: int) -> None:
    """What it is seen not to hold any more is anybody's. Where that cannot be seen, it is nobody's: it is stopped then."""
    clock = services.clock
    until = clock.monotonic() + _FREES_S
    while not await services.admission.sleepers.leave(pool, epoch) and clock.monotonic() < until:
        await a_moment(services)


async def _wake(pool: Pool, services: Services) -> None:
    """Not before its memory is free: an engine that wakes into another one's dies of that. Raises EngineError."""
    dialect, limit_s = dialect_of(pool), pool.definition.policy.sleep_timeout_s
    obstacle: str | None = None
    try:
        async with asyncio.timeout(limit_s):
            while (obstacle := await services.admission.sleepers.retake(pool)) is not None:
                if services.admission.sleepers.has_left(pool):  # others were promised it
                    raise NoRoomError(obstacle)
                await a_moment(services)
            await services.prober.ask(url_of(pool), dialect.wake)
            while await is_asleep(pool, services):
                await a_moment(services)
    except TimeoutError:
        raise EngineError(obstacle or f"it did not wake within {duration(limit_s)}") from None
    except (aiohttp.ClientError, OSError, ValueError) as problem:
        raise EngineError(_why(problem)) from problem
