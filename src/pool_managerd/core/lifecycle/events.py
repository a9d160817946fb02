"""What can happen to a pool: requests, news from its helpers, the timer. Frozen values, compared with ``==``."""

from __future__ import annotations

from dataclasses import dataclass

from pool_managerd.core.activity import NOT_SEEN, Activity
from pool_managerd.core.crash import CrashClass


@dataclass(frozen=True, slots=True)
class Event:
    """Something happened, or somebody asks for something."""


@dataclass(frozen=True, slots=True)
class Start(Event):
    """Bring the engine up, joining what is under way already.

    ``retry`` false: a failed start is final (a submitted preload). ``origin`` tells who asks: ``demand`` waits for a
    restart that is due instead of hastening it. ``join`` false: refused where there is something to join. ``anew``: it
    is to run something else than before.
    """

    retry: bool = True
    origin: str = "request"
    join: bool = True
    anew: bool = False


class CancelStart(Event):
    """Give up a start that is under way; refused when there is none."""


class Stop(Event):
    """Stop now, without waiting for leases, and stay down."""


@dataclass(frozen=True, slots=True)
class Evict(Event):
    """Make room: stop, unless ``active_leases`` are in flight; demand may start it again. ``asleep``: a ready engine is put to
    sleep instead, and demand wakes it.
    """

    active_leases: int = 0
    asleep: bool = False


class Restart(Event):
    """Stop if need be, then start."""


class Hold(Event):
    """From now on nothing starts by itself."""


class Release(Event):
    """End a hold; a start that was due happens now."""


@dataclass(frozen=True, slots=True)
class Drain(Event):
    """Refuse leases, wait for ``active_leases`` to end, stop at the latest after ``deadline_ms``.

    ``in_flight``: the requests that the engine says it has, of clients that may have no lease. ``recall``: at the deadline it is
    taken back instead.
    """

    deadline_ms: int
    active_leases: int
    in_flight: int = 0
    recall: bool = False


class Undrain(Event):
    """Take a drain back that has not stopped the engine yet."""


@dataclass(frozen=True, slots=True)
class LeasesChanged(Event):
    """``active`` leases are in flight now."""

    active: int


@dataclass(frozen=True, slots=True)
class Quarantine(Event):
    """A GPU of this pool is out of use. ``lost``: whatever ran on it cannot go on."""

    reason: str
    lost: bool = False


class EndQuarantine(Event):
    """The GPUs of this pool are healthy again."""


class ResetBreaker(Event):
    """An operator forgives the failures so far."""


class Purge(Event):
    """What was kept of the pool is deleted: it is as it was before its first start."""


@dataclass(frozen=True, slots=True)
class Sleep(Event):
    """Give GPU memory back and keep the process: as a Drain that is taken back at its deadline, but for how it ends."""

    deadline_ms: int
    active_leases: int = 0
    in_flight: int = 0


class Wake(Event):
    """Take GPU memory again."""


@dataclass(frozen=True, slots=True)
class Adopt(Event):
    """After a restart of the daemon: launch ``epoch``, of the replica of that name, runs still, or has ended when nobody
    watched it.
    """

    epoch: int
    replica_id: str = "r0"


@dataclass(frozen=True, slots=True)
class Tick(Event):
    """The timer fired. ``stuck`` says where in the kernel a process is that was killed and did not end, if that is known."""

    stuck: str = ""


@dataclass(frozen=True, slots=True)
class EpochEvent(Event):
    """News from launch number ``epoch``; news from an older launch is stale and changes nothing."""

    epoch: int


class StagingProgress(EpochEvent):
    """Bytes are still moving."""


@dataclass(frozen=True, slots=True)
class Staged(EpochEvent):
    """Model on disk, engine prepared."""

    external: bool = False
    uses_gpus: bool = False
    warmable: bool = True
    keeps_slots: bool = False


@dataclass(frozen=True, slots=True)
class StagingFailed(EpochEvent):
    """The model or the engine could not be made ready. ``reason`` is a failure reason of SPEC §2.3."""

    error: str
    retriable: bool = True
    reason: str = "preload_failed"


@dataclass(frozen=True, slots=True)
class Spawned(EpochEvent):
    """The engine process runs."""

    pid: int


@dataclass(frozen=True, slots=True)
class SpawnFailed(EpochEvent):
    """The engine process could not be run."""

    error: str
    retriable: bool = True


@dataclass(frozen=True, slots=True)
class ProbeSucceeded(EpochEvent):
    """A good answer to a probe of this launch, and what the engine was seen to do meanwhile."""

    activity: Activity = NOT_SEEN


@dataclass(frozen=True, slots=True)
class ProbeFailed(EpochEvent):
    """A bad answer or none. ``conclusive``: no further one is needed to know that the engine does not serve.

    ``silent``: how many external engines do not answer on this node, this one included. ``timed_out``: there was no answer at
    all, so that ``activity``, what the engine was seen to do meanwhile, tells whether it is busy.
    """

    reason: str
    conclusive: bool = False
    silent: int = 1
    timed_out: bool = False
    activity: Activity = NOT_SEEN


class ProbeDiscarded(EpochEvent):
    """The prober itself failed: nothing was learnt."""


class WarmedUp(EpochEvent):
    """The warm-up prompt was answered."""


@dataclass(frozen=True, slots=True)
class WarmupFailed(EpochEvent):
    """The warm-up prompt was not answered; this only warns."""

    error: str


@dataclass(frozen=True, slots=True)
class CacheRestored(EpochEvent):
    """The engine has what could be given back to it: ``slots`` of them, with a proof of each."""

    slots: int = 0


class CacheSaved(EpochEvent):
    """What is worth it is saved, or cannot be: the engine may be stopped."""


class Died(EpochEvent):
    """The engine process is dead; how it ended is not known yet."""


@dataclass(frozen=True, slots=True)
class Exited(EpochEvent):
    """The process is reaped. ``code`` or ``signal`` tell how, both None when that was lost.

    ``summary`` is the last_error text (SPEC §8.5), ``evidence`` the line of the log that says most; ``crash`` is its class;
    ``port_conflict`` is true when the log says that the port was taken. ``graceful``: an engine that may end by itself
    did so; one that serves until it is stopped has failed, whatever its exit code says. ``stopped``: its shim was told to stop
    it, by whoever it was: an earlier daemon, or a person.
    """

    code: int | None = None
    signal: int | None = None
    summary: str = ""
    evidence: str = ""
    crash: CrashClass = CrashClass.UNKNOWN
    port_conflict: bool = False
    graceful: bool = False
    stopped: bool = False


class VramFree(EpochEvent):
    """The GPUs no longer list the engine's processes."""


@dataclass(frozen=True, slots=True)
class VramHeld(EpochEvent):
    """The memory was not given back in time; ``holder`` is the end of a sentence: by whom it is held, or why nobody knows."""

    holder: str


@dataclass(frozen=True, slots=True)
class HelperDied(EpochEvent):
    """The task that worked for this launch ended without an answer."""

    what: str


@dataclass(frozen=True, slots=True)
class Adopted(EpochEvent):
    """The engine that was found is ours; when it has ended already, that comes as news of its own.

    ``was_ready``: it served under the daemon before this one; ``asleep``: it sleeps; ``gave_way``: it does so to make room.
    ``drain_since`` and ``drain_deadline`` are those of a drain that was under way, with ``active_leases`` in flight. Monotonic
    seconds.
    """

    started_at: float
    was_ready: bool = False
    uses_gpus: bool = False
    warmable: bool = False
    keeps_slots: bool = False
    asleep: bool = False
    gave_way: bool = False
    drain_since: float | None = None
    drain_deadline: float | None = None
    active_leases: int = 0


@dataclass(frozen=True, slots=True)
class NotAdopted(EpochEvent):
    """The engine that was found is gone or not ours."""

    reason: str


class Slept(EpochEvent):
    """The engine says that it sleeps."""


@dataclass(frozen=True, slots=True)
class SleepFailed(EpochEvent):
    """It would not fall asleep, or may have and does not say."""

    error: str


@dataclass(frozen=True, slots=True)
class NoRoomToWake(EpochEvent):
    """What it had before it fell asleep is another's now, as ``what`` says."""

    what: str


class Woke(EpochEvent):
    """The engine says that it is awake."""
