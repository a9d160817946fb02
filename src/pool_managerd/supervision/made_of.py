"""What an engine that goes on under another daemon was made of, and whether that is still so.

A running pool is never touched for it: whoever wants the present configuration or file restarts the pool.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

from pool_managerd.config.pools import DECIDED
from pool_managerd.supervision.pool import Pool
from pool_managerd.supervision.protocols import Records

CONFIGURATION = "configuration"
"""The kind of the facts that say by which configuration each pool's engine was launched."""


def keep_configuration(pool: Pool, records: Records) -> None:
    """The pool's engine was launched just now, by its configuration of now."""
    digest = _digest(pool)
    if digest is not None and digest != pool.launched_as:
        pool.launched_as = digest
        records.note_fact(CONFIGURATION, pool.pool_id, digest)


def runs_by_another(pool: Pool, records: Records) -> bool:
    """Whether the engine was launched by another configuration than the pool has now, by this daemon or the one before."""
    known, digest = pool.launched_as or records.facts(CONFIGURATION).get(pool.pool_id), _digest(pool)
    return known is not None and digest is not None and any(known.get(key, value) != value for key, value in digest.items())


def changed_configuration(pool: Pool, records: Records) -> Iterator[str]:
    """A sentence, where that is so."""
    if runs_by_another(pool, records):
        yield f"Pool '{pool.pool_id}' still runs as an earlier configuration said; restart it to apply the present one"


def changed_files(pool_id: str, paths: Iterable[str]) -> Iterator[str]:
    """A sentence for each of these files, which are others now than at the launch."""
    for path in paths:
        yield f"Engine of pool '{pool_id}' still runs what {path} was at its start; it is another file now"


def _digest(pool: Pool) -> dict[str, str] | None:
    """Of what an engine is launched by in the pool's configuration; None for a pool that has none."""
    if pool.config is None:
        return None
    return {"launch": hashlib.sha256(pool.config.model_dump_json(exclude=set(DECIDED)).encode()).hexdigest()}
