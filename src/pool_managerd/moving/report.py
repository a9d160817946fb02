"""What became of every key of a file that was moved over: exactly one of four things, and why."""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass

from pool_managerd.config.parse import KeyPath
from pool_managerd.moving.source import Source


class Outcome(enum.StrEnum):
    """``mapped``: a key of ours says the same. ``kept``: it stands as it was, in a place for that. ``needless``: nothing is lost
    without it. ``dropped``: something is lost, and the finding says what to do.
    """

    MAPPED = "mapped"
    KEPT = "kept"
    NEEDLESS = "needless"
    DROPPED = "dropped"


@dataclass(frozen=True, slots=True)
class Finding:
    """One key (or flag) of the file: ``to`` is the key of ours that it went to, ``why`` the sentence for people."""

    key: str
    line: int | None
    outcome: Outcome
    to: str = ""
    why: str = ""

    @property
    def text(self) -> str:
        """Where it went, and why, in one."""
        return ": ".join(part for part in (self.to, self.why) if part)


class Findings:
    """What was found so far. A path that has a finding needs none for what lies below it."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._found: list[Finding] = []
        self._by_place: dict[KeyPath, list[Finding]] = {}
        self._covered: set[KeyPath] = set()
        self._above: set[KeyPath] = set()

    def mapped(self, path: KeyPath, to: str, why: str = "", *, part: str = "") -> None:
        self._add(path, Outcome.MAPPED, to, why, part)

    def kept(self, path: KeyPath, to: str, why: str = "", *, part: str = "") -> None:
        self._add(path, Outcome.KEPT, to, why, part)

    def needless(self, path: KeyPath, why: str, *, part: str = "") -> None:
        self._add(path, Outcome.NEEDLESS, "", why, part)

    def dropped(self, path: KeyPath, why: str, *, part: str = "") -> None:
        self._add(path, Outcome.DROPPED, "", why, part)

    def implied(self, key: str, to: str, why: str, near: KeyPath = ()) -> None:
        """What no key says, or none alone, and the other tool does all the same."""
        self._found.append(Finding(key, self._source.line(near), Outcome.MAPPED, to, why))

    def missing(self, key: str, why: str) -> None:
        """What no key says, and is needed."""
        found = Finding(key, None, Outcome.DROPPED, "", why)
        self._found.append(found)
        self._by_place.setdefault((), []).append(found)

    def opened(self, *paths: KeyPath) -> None:
        """Mappings whose keys are looked at one by one: an unknown one in them does not make them unknown."""
        self._above.update(paths)

    def usual(self, path: KeyPath, why: str) -> None:
        """Needless, where the file has the key and nothing was found of it yet."""
        if path in self._source.places and path not in self._covered:
            self.needless(path, why)

    def lost(self, path: KeyPath, why: str, *, truth: bool = False) -> None:
        """Dropped, where the key says anything; ``truth``: anything but no."""
        value = self._source.truth(path, False) if truth else self._source.get(path)
        if value in (None, "", [], {}, False):
            self.usual(path, "it says nothing")
        else:
            self.dropped(path, why)

    def drop_unknown(self, why: str) -> None:
        """A finding for every key that has none: nobody knows it."""
        for path in list(self._uncovered((), self._source.values)):
            self.dropped(path, why)

    def named(self, path: KeyPath) -> str:
        """As its findings call it."""
        return "".join(char if char.isprintable() else "�" for char in self._source.named(path))

    def within(self, place: KeyPath, outcome: Outcome) -> list[Finding]:
        """Those of a model (``("models", NAME)``), or of a key of the top, in the order in which they were found."""
        return [one for one in self._by_place.get(place, ()) if one.outcome is outcome]

    def elsewhere(self, outcome: Outcome) -> list[Finding]:
        """Those of no model."""
        return [
            one for place, found in self._by_place.items() for one in found if place[:1] != ("models",) and one.outcome is outcome
        ]

    def all(self) -> tuple[Finding, ...]:
        """In the order of the file; what no key says comes last."""
        return tuple(sorted(self._found, key=lambda one: one.line if one.line is not None else 1 << 62))

    def _add(self, path: KeyPath, outcome: Outcome, to: str, why: str, part: str) -> None:
        self._covered.add(path)
        self._above.update(path[:length] for length in range(len(path)))
        key = "".join(char if char.isprintable() else "�" for char in f"{self._source.named(path)} {part}".strip()[:400])
        found = Finding(key, self._source.line(path), outcome, to, why)
        self._found.append(found)
        self._by_place.setdefault(path[:2] if path[0] == "models" else path[:1], []).append(found)

    def _uncovered(self, path: KeyPath, value: object) -> Iterator[KeyPath]:
        if path in self._covered:
            return
        if isinstance(value, dict | list) and (path in self._above or not path):
            for key, part in value.items() if isinstance(value, dict) else enumerate(value):
                yield from self._uncovered((*path, key), part)
        else:
            yield path
