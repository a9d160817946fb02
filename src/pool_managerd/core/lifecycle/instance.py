"""One launch of a pool's engine: what is true of this process and of no other.

Times are monotonic seconds (``now`` is always an argument); durations carry their unit in the name.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from pool_managerd.core.crash import CrashClass
from pool_managerd.core.instance_id import InstanceId
from pool_managerd.core.lifecycle.phase import Phase


class After(StrEnum):
    """What follows once a stop is complete."""

    STAY = "stay"
    START = "start"  # of the same launch again: a restart, or another port
    NEW_START = "new_start"  # somebody asked for a start while the stop was under way
    RECOVER = "recover"


@dataclass(frozen=True, slots=True)
class Instance:
    """One replica's launch: the one that runs, or the last one, or the one that the next start will bring.

    ``epoch`` is the launch's number; it grows with every launch of the pool, over daemon restarts too, so that a number
    means one launch for ever. ``deadline`` and ``next_probe_at`` are its only timers. ``launched_at`` is when the start
    was decided, ``started_at`` when the process began to run, ``ready_since`` when it was ready first. ``hung`` stands
    beside the phase: it stopped answering and was left running. ``busy`` too: it works, and answers no probes meanwhile.

    ``keeps_slots``: what is in the engine's slots is saved before a planned stop (``saving``) and restored while it warms up
    (``restoring``).

    ``drain_recall``: at its deadline a drain is taken back instead; ``drain_sleeps``: it ends in sleep instead of a stop.

    While stopping: ``after`` is what follows, ``fell_from`` where it was, ``asked`` whether the stop was our wish.
    ``reaped``: the process is dead; ``vram_pending``: its exit is recorded and its GPU memory not yet seen free.
    ``pending_error`` and ``pending_crash`` say why it is to recover, in a sentence and in a word.
    """

    id: InstanceId
    epoch: int = 0
    phase: Phase = Phase.DOWN
    since: float = 0.0
    deadline: float | None = None
    launched_at: float | None = None
    started_at: float | None = None
    ready_since: float | None = None
    # the engine
    has_process: bool = False
    external: bool = False
    uses_gpus: bool = False
    warmable: bool = True
    warmed: bool = False
    keeps_slots: bool = False
    restoring: bool = False
    restored_slots: int = 0
    # probing
    next_probe_at: float | None = None
    probe_sent_at: float | None = None
    probe_failures: int = 0
    probe_reason: str = ""
    last_good_at: float | None = None
    hung: bool = False
    busy: bool = False
    # draining
    drain_since: float | None = None
    drain_leases: int = 0
    drain_recall: bool = False
    drain_sleeps: bool = False
    force_stopped: bool = False
    # stopping
    saving: bool = False
    after: After = After.STAY
    fell_from: Phase | None = None
    asked: bool = False
    reaped: bool = False
    killed: bool = False
    vram_pending: bool = False
    pending_error: str | None = None
    pending_crash: CrashClass = CrashClass.UNKNOWN
