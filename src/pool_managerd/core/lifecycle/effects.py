"""What a step asks its actor to do. Frozen values, compared with ``==`` in tests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from pool_managerd.core.crash import CrashClass


@dataclass(frozen=True, slots=True)
class Effect:
    """Something for the actor to do. Effects are started, never awaited; their outcome returns as an event."""


@dataclass(frozen=True, slots=True)
class LaunchEffect(Effect):
    """Something to do for launch number ``epoch``."""

    epoch: int


class StageArtifacts(LaunchEffect):
    """Reserve memory for this launch, bring the model to disk and prepare the engine."""


class CancelStaging(LaunchEffect):
    """Nobody wants the result of this launch's staging any more."""


class SpawnEngine(LaunchEffect):
    """Run the prepared engine."""


@dataclass(frozen=True, slots=True)
class WritePid(LaunchEffect):
    """Write the pid file; it exists before the first probe."""

    pid: int


class SendProbe(LaunchEffect):
    """Ask the engine how it is."""


class SendWarmup(LaunchEffect):
    """Send the warm-up prompt and measure it."""


class SlotEffect(LaunchEffect):
    """Something to do about what is in the engine's slots."""


class RestoreCache(SlotEffect):
    """Give the engine back what it had read before, or have it read what it is to know; the first it does before it is ready."""


class SaveCache(SlotEffect):
    """Save what the engine has read of its prompts: it is stopped next."""


class Announce(LaunchEffect):
    """Write the handoff file: this launch is ready for the first time."""


@dataclass(frozen=True, slots=True)
class StopEngine(LaunchEffect):
    """Begin the stop ladder: SIGTERM, ``grace_ms``, SIGKILL."""

    grace_ms: int


class KillEngine(LaunchEffect):
    """No more grace."""


class Withdraw(LaunchEffect):
    """Remove pid and handoff file. Done before ``live`` is seen false."""


class EndLeases(LaunchEffect):
    """The leases of this launch end with it."""


class AwaitVram(LaunchEffect):
    """Watch the GPUs until the engine's memory is seen free."""


class ReleaseVram(LaunchEffect):
    """Release the reservation of this launch."""


class SleepEngine(LaunchEffect):
    """Call the engine's sleep."""


class WakeEngine(LaunchEffect):
    """Call the engine's wake."""


class AdoptEngine(LaunchEffect):
    """Re-open the handles of an engine found running."""


@dataclass(frozen=True, slots=True)
class ReportCrash(LaunchEffect):
    """This launch has failed while its process ran: it is ended for ``error``, a sentence, which is of class ``crash``."""

    crash: CrashClass
    error: str


@dataclass(frozen=True, slots=True)
class Refuse(Effect):
    """The request cannot be served now; ``code`` is an error code of SPEC §11.2. ``retry_after_s``: how long that holds."""

    code: str
    message: str
    retry_after_s: float | None = None


@dataclass(frozen=True, slots=True)
class Say(Effect):
    """Tell people and machines: ``human`` is one sentence, ``fields`` the same for machines (SPEC §14)."""

    action: str
    human: str
    level: str = "info"
    fields: Mapping[str, object] = field(default_factory=dict)
