"""What a step asks its driver to do. Frozen values, compared with ``==`` in tests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Effect:
    """Something for the driver to do. Effects are started, never awaited; their outcome returns as an event."""


@dataclass(frozen=True, slots=True)
class StageArtifacts(Effect):
    """Promise memory to this launch, bring the model to disk and prepare the engine."""

    epoch: int


@dataclass(frozen=True, slots=True)
class CancelStaging(Effect):
    """Nobody wants the result of this launch's staging any more."""

    epoch: int


@dataclass(frozen=True, slots=True)
class SpawnEngine(Effect):
    """Run the prepared engine."""

    epoch: int


@dataclass(frozen=True, slots=True)
class WritePid(Effect):
    """Write the pid file; it exists before the first probe."""

    epoch: int
    pid: int


@dataclass(frozen=True, slots=True)
class SendProbe(Effect):
    """Ask the engine how it is."""

    epoch: int


@dataclass(frozen=True, slots=True)
class SendWarmup(Effect):
    """Send the warm-up prompt and measure it."""

    epoch: int


@dataclass(frozen=True, slots=True)
class Announce(Effect):
    """Write the handoff file: this launch is ready for the first time."""

    epoch: int


@dataclass(frozen=True, slots=True)
class StopEngine(Effect):
    """Begin the stop ladder: SIGTERM, ``grace_ms``, SIGKILL."""

    epoch: int
    grace_ms: int


@dataclass(frozen=True, slots=True)
class KillEngine(Effect):
    """No more grace."""

    epoch: int


@dataclass(frozen=True, slots=True)
class Withdraw(Effect):
    """Remove pid and handoff file. Done before ``live`` is seen false."""

    epoch: int


@dataclass(frozen=True, slots=True)
class EndLeases(Effect):
    """The leases of this launch end with it."""

    epoch: int


@dataclass(frozen=True, slots=True)
class AwaitVram(Effect):
    """Watch the GPUs until the engine's memory is seen free."""

    epoch: int


@dataclass(frozen=True, slots=True)
class ReleaseVram(Effect):
    """Give the promise of this launch's memory back."""

    epoch: int


@dataclass(frozen=True, slots=True)
class SleepEngine(Effect):
    """Call the engine's sleep."""

    epoch: int


@dataclass(frozen=True, slots=True)
class WakeEngine(Effect):
    """Call the engine's wake."""

    epoch: int


@dataclass(frozen=True, slots=True)
class AdoptEngine(Effect):
    """Re-open the handles of an engine found running."""

    epoch: int


@dataclass(frozen=True, slots=True)
class Refuse(Effect):
    """The request cannot be served now; ``code`` is an error code of SPEC §11.2."""

    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Say(Effect):
    """Tell people and machines: ``human`` is one sentence, ``fields`` the same for machines (SPEC §14)."""

    action: str
    human: str
    level: str = "info"
    fields: Mapping[str, object] = field(default_factory=dict)
