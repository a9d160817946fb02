"""What was found of other tools' models for a reference, before any of it is hashed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pool_managerd.errors import PoolError
from pool_managerd.models.foreign_files import ForeignFile
from pool_managerd.models.used_notes import Used


@dataclass(frozen=True, slots=True)
class Candidate:
    """What ``tool`` has for a reference: all its files, unverified. ``notices`` say what of it engines do not get."""

    ref: str
    tool: str
    files: tuple[ForeignFile, ...]
    source: str = ""
    notices: tuple[str, ...] = ()

    @classmethod
    def of(cls, used: Used) -> Candidate:
        """What is used, as what it was found as."""
        files = (ForeignFile(Path(one.place).name, Path(one.place), Path(one.root), one.size, one.sha256) for one in used.files)
        return cls(used.ref, used.tool, tuple(files), used.source)

    @property
    def digests(self) -> tuple[str, ...]:
        """What the tool itself says that its files are; empty where it does not of all."""
        told = tuple(f"sha256:{file.sha256}" for file in self.files if file.sha256)
        return told if len(told) == len(self.files) else ()

    @property
    def size_bytes(self) -> int:
        return sum(file.size for file in self.files)


@dataclass(frozen=True, slots=True)
class Search:
    """What was found for a reference; ``reasons`` say why of what is there something is not used."""

    candidates: tuple[Candidate, ...] = ()
    reasons: tuple[str, ...] = ()
    used: Used | None = None

    def told_with(self, problem: PoolError) -> PoolError:
        """``problem`` with the reasons, too: there is something here that looks like what could not be had."""
        if self.reasons:
            here = f"on this machine, and not used: {'; '.join(self.reasons)}"
            problem.hint = f"{problem.hint}; {here}" if problem.hint else here
        return problem
