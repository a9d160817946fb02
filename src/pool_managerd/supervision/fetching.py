"""How far the download of a pool's model is, told while it is staged: a start that fetches is not late as long as bytes come."""

from __future__ import annotations

from pool_managerd.core.lifecycle import events as ev
from pool_managerd.core.narration import duration, size
from pool_managerd.supervision.foresight import amount, character, require_possible
from pool_managerd.supervision.pool import Pool
from pool_managerd.supervision.protocols import Clock
from pool_managerd.supervision.reports import Reports
from pool_managerd.supervision.services import Services

STEP, CHECK_STEP, LOOK_STEP, UNPACK_STEP = "fetch", "model", "look", "unpack"
_VERBS = {STEP: "Fetching", CHECK_STEP: "Verifying", UNPACK_STEP: "Unpacking"}
_TELL_S, _EVENT_S = 0.5, 30.0
_WEIGHT = 0.3


async def fetch_model(pool: Pool, epoch: int, actor: Reports, s: Services) -> None:
    """Bring the model of launch ``epoch`` to this machine, before any memory is reserved for it. Raises PoolError."""
    config, definition = pool.config, pool.definition
    if config is None or definition.external or definition.barred or pool.submitted is not None:
        return
    step = pool.launch.step
    actor.learn(epoch, step=LOOK_STEP)
    try:
        ahead = await require_possible(pool, s)
    finally:
        actor.learn(epoch, step=step)
    if ahead is not None and ahead.shape is not None:
        human = f"The model of pool '{pool.pool_id}' is fetched: {amount(ahead)}; it is {character(ahead.shape)}"
        actor.emit("notice", human, bytes_total=ahead.size_bytes)
    telling = FetchProgress(pool, epoch, actor, s.clock)
    checking = FetchProgress(pool, epoch, actor, s.clock, CHECK_STEP)
    unpacking = FetchProgress(pool, epoch, actor, s.clock, UNPACK_STEP)
    await s.models.fetch(config.model, config.checksums, progress=telling, checking=checking, unpacking=unpacking)
    if telling.began or checking.began:
        actor.learn(epoch, step=step, progress=(0, 0), rate=0.0)


class Pace:
    """Bytes a second, the present ones counting most; what was there before the first one is not counted."""

    def __init__(self, clock: Clock) -> None:
        self.bytes_per_s = 0.0
        self._clock = clock
        self._last: tuple[float, int] | None = None

    def seen(self, done: int) -> bool:
        """Whether enough time has passed to say it again."""
        now = self._clock.monotonic()
        if self._last is None or done < self._last[1]:  # it begins, or begins anew
            self._last = now, done
            return True
        passed = now - self._last[0]
        if passed < _TELL_S:
            return False
        present = (done - self._last[1]) / passed
        self.bytes_per_s = present if not self.bytes_per_s else self.bytes_per_s + _WEIGHT * (present - self.bytes_per_s)
        self._last = now, done
        return True


class FetchProgress:
    """Called with (bytes done, bytes in all; 0 where nobody knows). ``CHECK_STEP``: of a model that is here, and is hashed;
    ``UNPACK_STEP``: of one that was fetched as an archive.
    """

    def __init__(self, pool: Pool, epoch: int, actor: Reports, clock: Clock, step: str = STEP) -> None:
        self._pool, self._epoch, self._actor, self._clock, self._step = pool, epoch, actor, clock, step
        self._pace = Pace(clock)
        self._event_at = 0.0
        self.began = False

    def __call__(self, done: int, total: int) -> None:
        due, rate = self._pace.seen(done), self._pace.bytes_per_s
        self._actor.learn(self._epoch, step=self._step, progress=(done, total), rate=rate)
        if not due:
            return
        self._actor.post(ev.StagingProgress(self._epoch))
        now = self._clock.monotonic()
        if not self.began or now - self._event_at >= _EVENT_S:
            self._event_at = now
            left_s = eta_s(done, total, rate)
            human = f"{_VERBS[self._step]} the model of pool '{self._pool.pool_id}': {told(done, total, rate)}"
            self._actor.emit(
                "fetch", human, bytes_done=done, bytes_total=total, bytes_per_s=round(rate),
                eta_ms=None if left_s is None else round(left_s * 1000),
            )  # fmt: skip
        self.began = True


def told(done: int, total: int, bytes_per_s: float) -> str:
    """How far it is, in words."""
    left_s = eta_s(done, total, bytes_per_s)
    of = f"{size(done)} of {size(total)}" if total else size(done)
    pace = f", {size(round(bytes_per_s))} a second" if bytes_per_s >= 1 else ""
    return f"{of}{pace}{'' if left_s is None else f', {duration(left_s)} left'}"


def eta_s(done: int, total: int, bytes_per_s: float) -> float | None:
    """Seconds to the end at this rate; None where that cannot be told."""
    return (total - done) / bytes_per_s if total > done and bytes_per_s >= 1 else None
