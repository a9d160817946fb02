"""Purging: what is kept on disk for a pool is deleted, as far as it is ours (SPEC §10.3)."""

from __future__ import annotations

from dataclasses import dataclass

from pool_managerd.errors import SpecError

MAX_MODELS = 64
WORK, CACHE = "work", "cache"
"""The directories of the runtime directory in which each pool has one of its own."""


@dataclass(frozen=True, slots=True)
class PurgeRequest:
    """Stop ``pool_id`` and delete its working directory; with ``delete_cache_dirs`` what later starts would use again, too.

    ``purge_models`` (references) and ``purge_engine`` are refused for what is not in a cache of ours. An engine that runs is
    drained first, or, with ``force``, stopped at once; with neither it is not purged.
    """

    pool_id: str
    purge_engine: bool = False
    purge_models: tuple[str, ...] = ()
    drain_first: bool = True
    delete_cache_dirs: bool = False
    force: bool = False

    def __post_init__(self) -> None:
        if len(self.purge_models) > MAX_MODELS:
            raise SpecError(
                f"cannot purge pool {self.pool_id}: {len(self.purge_models)} models are named, more than {MAX_MODELS}",
                pool_id=self.pool_id,
            )

    @property
    def places(self) -> tuple[str, ...]:
        """Which of the pool's directories are to go."""
        return (WORK, CACHE) if self.delete_cache_dirs else (WORK,)

    @property
    def stops_by(self) -> str | None:
        """How an engine that runs is ended: ``stop`` or ``drain``; None: not at all."""
        return "stop" if self.force else "drain" if self.drain_first else None


@dataclass(frozen=True, slots=True)
class Freed:
    """A directory and the bytes of disk that its files take, or took; those with another name elsewhere are none."""

    path: str
    bytes: int
