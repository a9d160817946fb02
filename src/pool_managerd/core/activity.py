"""Whether an engine works, from what can be seen of it: silence is not death, and an answer to ``/health`` is not work.

A `Sample` is what was seen at one moment: the CPU time of the engine's processes, the engine's own counters. `observe` folds
samples into a `Track`, which remembers when anything last moved; `judge` says what follows from it. Three things move, and
they do not prove the same: **tokens** are work; **CPU or GPU time** may be work or an endless loop, and is believed up to
``busy_limit_s``; **bytes** (read, written, logged, held in memory) are the progress of a load, and say nothing of a request.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import StrEnum

from pool_managerd.core import narration

WORKING_CORES = 0.05
"""Less CPU than this share of a core is an engine that polls."""
WORKING_GPU_PERCENT = 5
_CPU_WINDOW_S = 1.0
"""CPU time is counted in hundredths of a second: a rate over less is noise."""
_LOADED_BYTES = 1 << 20


class Verdict(StrEnum):
    """What an engine is doing. ``unknown``: nothing can be said, so probes alone decide."""

    UNKNOWN = "unknown"
    IDLE = "idle"
    """It has nothing to do, or, where it answers no probe, nothing of it moves."""
    BUSY = "busy"
    HUNG = "hung"
    """Work is in hand and stands still."""
    UNKILLABLE = "unkillable"
    """It stands still inside the kernel, where no signal reaches it."""

    @property
    def stands_still(self) -> bool:
        """It does nothing for those who wait for it, however it answers its probes."""
        return self in (Verdict.HUNG, Verdict.UNKILLABLE)


@dataclass(frozen=True, slots=True)
class Activity:
    """The verdict and the end of a sentence that says what it rests on: "it …".

    ``loaded_at`` is when bytes of a load last moved, ``worked_at`` when CPU, GPU or tokens did; None: never seen.
    """

    verdict: Verdict = Verdict.UNKNOWN
    why: str = ""
    loaded_at: float | None = None
    worked_at: float | None = None


NOT_SEEN = Activity()


@dataclass(frozen=True, slots=True)
class ActivityRules:
    """``stall_s``: so long may work in hand stand still; ``busy_limit_s``: so long is CPU time believed to be work. Samples
    that are more than ``gap_s`` apart say nothing together: we slept, or starved.
    """

    stall_s: float = 60.0
    busy_limit_s: float = 600.0
    gap_s: float = 14.0


@dataclass(frozen=True, slots=True)
class Sample:
    """What was seen at monotonic second ``at``. None is not known, and never held against anybody.

    ``cpu_s``, ``data_bytes`` (read and written) and ``memory_bytes`` (RAM and VRAM) are of all processes of the engine.
    ``tokens`` is a counter that grows with every token, prompt or generated; ``requests`` are those in work or waiting, by
    the engine's own word. ``unanswered_s``: for so long it was asked for these in vain; ``prompted_s``: a prompt of the daemon's
    own waits for so long. ``stopped`` names a process of it that somebody stopped (SIGSTOP), ``blocked`` one in uninterruptible
    sleep, and in what.
    """

    at: float
    cpu_s: float | None = None
    data_bytes: int | None = None
    memory_bytes: int | None = None
    log_bytes: int | None = None
    gpu_percent: int | None = None
    tokens: float | None = None
    requests: int | None = None
    unanswered_s: float = 0.0
    prompted_s: float = 0.0
    stopped: str = ""
    blocked: str = ""


@dataclass(frozen=True, slots=True)
class Track:
    """What samples have shown, from the one at ``since`` to the ``last`` one.

    ``mark`` holds the values that the next movement is measured from, ``cores`` the CPUs in use. ``free_at`` is when it last
    had no request, ``running_at`` and ``unblocked_at`` when no process of it was stopped or blocked.
    """

    last: Sample
    mark: Sample
    since: float
    free_at: float
    running_at: float
    unblocked_at: float
    cores: float | None = None
    cpu_at: float | None = None
    tokens_at: float | None = None
    loaded_at: float | None = None

    @classmethod
    def of(cls, first: Sample) -> Track:
        return cls(first, first, first.at, free_at=first.at, running_at=first.at, unblocked_at=first.at)


def observe(track: Track | None, seen: Sample, rules: ActivityRules) -> Track:
    """``track`` and one sample more. After a gap in our own time it begins anew (A9, J3)."""
    if track is None or not 0 <= seen.at - track.last.at <= rules.gap_s:
        return Track.of(seen)
    mark = track.mark
    track = replace(
        track, last=seen,
        free_at=track.free_at if seen.requests else seen.at,
        running_at=track.running_at if seen.stopped else seen.at,
        unblocked_at=track.unblocked_at if seen.blocked else seen.at,
    )  # fmt: skip
    if seen.tokens is not None and seen.tokens != mark.tokens:
        first = mark.tokens is None
        track = replace(track, mark=replace(track.mark, tokens=seen.tokens), tokens_at=track.tokens_at if first else seen.at)
    return _with_cpu(_with_load(track, seen), seen)


def _with_load(track: Track, seen: Sample) -> Track:
    """Bytes are counted at their highest so far, so that what comes and goes is no progress."""
    mark, moved = track.mark, False
    for name, enough in (("data_bytes", _LOADED_BYTES), ("memory_bytes", _LOADED_BYTES), ("log_bytes", 1)):
        value, before = getattr(seen, name), getattr(mark, name)
        if value is None or (before is not None and value - before < enough):
            continue
        moved = moved or before is not None
        mark = replace(mark, **{name: value})
    return replace(track, mark=mark, loaded_at=seen.at if moved else track.loaded_at)


def _with_cpu(track: Track, seen: Sample) -> Track:
    if seen.gpu_percent is not None and seen.gpu_percent >= WORKING_GPU_PERCENT:
        track = replace(track, cpu_at=seen.at)
    mark, window_s = track.mark, seen.at - track.mark.at
    if seen.cpu_s is None or (window_s < _CPU_WINDOW_S and mark.cpu_s is not None):
        return track
    track = replace(track, mark=replace(mark, at=seen.at, cpu_s=seen.cpu_s))
    if mark.cpu_s is None or window_s <= 0:
        return track
    cores = max(0.0, seen.cpu_s - mark.cpu_s) / window_s  # less than before: a process has ended
    return replace(track, cores=cores, cpu_at=seen.at if cores >= WORKING_CORES else track.cpu_at)


def judge(track: Track, now: float, rules: ActivityRules, *, silent_since: float | None = None) -> Activity:
    """What the engine is doing at ``now``; ``silent_since``: it has answered no probe since, None while it answers."""
    worked_at = _latest(track.cpu_at, track.tokens_at)
    verdict, why = _verdict(track, now, rules, silent_since, worked_at)
    return Activity(verdict, why, track.loaded_at, worked_at)


def _verdict(
    track: Track, now: float, rules: ActivityRules, silent_since: float | None, worked_at: float | None
) -> tuple[Verdict, str]:
    """1. a process of it is stopped; 2. it is blocked in the kernel; 3. nobody waits; 4. to 7. somebody waits."""
    last = track.last
    if last.stopped and now - track.running_at >= rules.stall_s:  # 1
        return Verdict.HUNG, f"{last.stopped} has been stopped (SIGSTOP) for {narration.duration(now - track.running_at)}"
    still_since = _latest(track.since, worked_at) or track.since
    if last.blocked and now - max(track.unblocked_at, still_since) >= rules.stall_s:  # 2
        return Verdict.UNKILLABLE, f"{last.blocked}, and nothing of it has moved for {narration.duration(now - still_since)}"
    waiting = _waiting(track, now, silent_since)
    moves = worked_at is not None and now - worked_at <= rules.gap_s
    if waiting is None:  # 3
        return (Verdict.BUSY, _at_work(track)) if moves and last.requests is None else (Verdict.IDLE, "has nothing to do")
    quiet_s, still_s = _standstill(track, now, waiting[0])
    if last.cpu_s is not None and still_s >= rules.stall_s:  # 4
        return Verdict.HUNG, f"{waiting[1]} for {narration.duration(still_s)}: no token, no CPU time"
    if quiet_s >= rules.busy_limit_s:  # 5
        return Verdict.HUNG, f"{waiting[1]} for {narration.duration(quiet_s)}: no token, whatever CPU it uses"
    if silent_since is None or moves:  # 6
        return Verdict.BUSY, _at_work(track)
    if track.cores is None:  # 7
        return (Verdict.UNKNOWN, "") if last.cpu_s is None else (Verdict.BUSY, "was seen too briefly to tell")
    stopped = f"{last.stopped} is stopped (SIGSTOP)" if last.stopped else ""
    return Verdict.IDLE, ": ".join(filter(None, ("nothing of it moves", last.blocked or stopped)))


def doubtful(track: Track, now: float, rules: ActivityRules) -> bool:
    """Half of a limit has passed: the engine's own word on its requests may be old, and one of ours would tell."""
    waiting = _waiting(track, now, None)
    return waiting is not None and _half_passed(track, now, rules, waiting[0])


def ignored(track: Track, now: float, rules: ActivityRules, silent_clients: Iterable[float]) -> bool:
    """Whether a client may be waiting that the engine's own gauges do not know: one of a connection that brought something, and
    no token since. vLLM's gauges are those of its core: what reached the API server when that stood still is in none.
    """
    moved_at = track.tokens_at if track.last.tokens is not None else _latest(track.cpu_at, track.tokens_at)
    asked = [now - silent_s for silent_s in silent_clients if moved_at is None or now - silent_s > moved_at]
    return bool(asked) and _half_passed(track, now, rules, max(track.since, min(asked)))


def _half_passed(track: Track, now: float, rules: ActivityRules, waiting_since: float) -> bool:
    quiet_s, still_s = _standstill(track, now, waiting_since)
    return still_s >= rules.stall_s / 2 or quiet_s >= rules.busy_limit_s / 2


def _waiting(track: Track, now: float, silent_since: float | None) -> tuple[float, str] | None:
    """Since when somebody has waited for it, and who; None when nobody does. What was before ``track`` is not known."""
    if track.last.requests:
        have = "has" if track.last.requests == 1 else "have"
        return track.free_at, f"{narration.count(track.last.requests, 'request')} {have} stood still"
    if silent_since is not None:
        return max(track.since, silent_since), "it has answered nothing"
    if track.last.unanswered_s > 0:
        return max(track.since, now - track.last.unanswered_s), "its own counters have not been answered"
    if track.last.prompted_s > 0:
        return max(track.since, now - track.last.prompted_s), "a prompt of the daemon's own has not been answered"
    return None


def _standstill(track: Track, now: float, waiting_since: float) -> tuple[float, float]:
    """For how many seconds who waits has seen no token, and neither token nor CPU time."""
    quiet_s = now - max(waiting_since, track.tokens_at or waiting_since)
    return quiet_s, min(quiet_s, now - (track.cpu_at or waiting_since))


def _at_work(track: Track) -> str:
    last = track.last
    facts = [f"{narration.count(last.requests, 'request')} running or waiting"] if last.requests else []
    facts += ["a prompt of the daemon's own waiting"] if last.prompted_s > 0 and not last.requests else []
    facts += [f"{track.cores:.1f} CPUs"] if track.cores is not None else []
    facts += [f"its GPU {last.gpu_percent} %"] if last.gpu_percent is not None else []
    return f"is at work ({', '.join(facts)})" if facts else "is at work"


def _latest(*times: float | None) -> float | None:
    return max((time for time in times if time is not None), default=None)
