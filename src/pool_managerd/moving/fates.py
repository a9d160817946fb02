"""What became of each key of presets, model by model: a key of ``[*]`` may fare otherwise with one model than with another."""

from __future__ import annotations

from pool_managerd.config.parse import KeyPath
from pool_managerd.moving.report import Findings, Outcome

_MAX_NAMED = 3

Fate = tuple[Outcome, str, str]
"""The outcome, where it went, why."""


class Fates:
    """What was found so far, by the path of the key."""

    def __init__(self) -> None:
        self._of: dict[KeyPath, dict[Fate, list[str]]] = {}

    def mapped(self, path: KeyPath, model: str, to: str, why: str = "") -> None:
        self.add(path, model, Outcome.MAPPED, to, why)

    def needless(self, path: KeyPath, model: str, why: str) -> None:
        self.add(path, model, Outcome.NEEDLESS, "", why)

    def dropped(self, path: KeyPath, model: str, why: str) -> None:
        self.add(path, model, Outcome.DROPPED, "", why)

    def add(self, path: KeyPath, model: str, outcome: Outcome, to: str, why: str) -> None:
        self._of.setdefault(path, {}).setdefault((outcome, to, why), []).append(model)

    def tell(self, path: KeyPath, findings: Findings) -> None:
        """One finding, or one for each fate, which names the models; a key that no model came to has none yet."""
        fates = self._of.get(path, {})
        for (outcome, to, why), models in fates.items():
            part = "" if len(fates) == 1 else f"({', '.join(models[:_MAX_NAMED])}{', …' if len(models) > _MAX_NAMED else ''})"
            if outcome is Outcome.MAPPED:
                findings.mapped(path, to, why, part=part)
            elif outcome is Outcome.KEPT:
                findings.kept(path, to, why, part=part)
            elif outcome is Outcome.NEEDLESS:
                findings.needless(path, why, part=part)
            else:
                findings.dropped(path, why, part=part)
        if not fates:
            findings.needless(path, "each model has its own")
