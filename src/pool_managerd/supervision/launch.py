"""What is known of one launch beside its phase: a frozen value, which the pool's actor replaces."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from pool_managerd.core.activity import NOT_SEEN, Activity
from pool_managerd.core.artifacts import AnyEngine
from pool_managerd.core.baselines import Baseline
from pool_managerd.core.crash_diagnosis import Diagnosis
from pool_managerd.core.gpu.allocation import Allocation
from pool_managerd.core.memory.estimator import LaunchEstimator
from pool_managerd.core.slot_cache import Restored
from pool_managerd.errors import PoolError
from pool_managerd.supervision.protocols import Process


@dataclass(frozen=True, slots=True)
class Launch:
    """Launch number ``epoch``. ``step`` says in a word how far a start has come, ``progress`` bytes done and in total,
    ``rate`` how many a second where they are fetched.

    ``allocation`` and ``sizing`` are what its GPUs were reserved by. ``cause`` is the error behind the latest failure.
    ``log_mark`` is where its part of the log begins, ``ready_at`` how many bytes of it there were when it was ready, ``log_tail``
    the end of that part, read once when the engine has ended, and ``diagnosis`` why it has.
    ``measured`` is what this engine version did with this model on these GPUs, in this launch or one before it.
    ``activity`` is what the last look at the engine saw it do. ``outdated`` are sentences on what the engine, which an earlier
    daemon started, was made of and is another now. ``requests`` are those that the engine had in hand when it was last asked
    while it drains. ``sleepless`` says why its sleep was of no use when it was last tried. ``restored`` is what was given back
    to it of what its slots held before.
    """

    epoch: int = 0
    step: str = ""
    progress: tuple[int, int] = (0, 0)
    rate: float = 0.0
    allocation: Allocation | None = None
    sizing: LaunchEstimator | None = None
    prepared: AnyEngine | None = None
    process: Process | None = None
    handoff_path: str | None = None
    cause: PoolError | None = None
    log_mark: Mapping[int, int] = field(default_factory=dict)
    ready_at: int = 0
    log_tail: tuple[str, ...] = ()
    diagnosis: Diagnosis | None = None
    measured: tuple[Baseline, ...] = ()
    activity: Activity = NOT_SEEN
    outdated: tuple[str, ...] = ()
    requests: int = 0
    sleepless: str = ""
    restored: Restored | None = None

    @property
    def device_uuids(self) -> tuple[str, ...]:
        """The GPUs that it was given."""
        return () if self.allocation is None else tuple(device.uuid for device in self.allocation.devices)

    def next(self, epoch: int, step: str) -> Launch:
        """The launch after this one, of which nothing is known yet."""
        return Launch(epoch, step, measured=self.measured)
