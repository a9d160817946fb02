"""What an engine that goes on under another daemon was made of, and whether that is still so.

A running pool is never touched for it: whoever wants the present configuration or file restarts the pool.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

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


def changed_configuration(pool: Pool, records: Records) -> Iterator[str]:
    """A sentence, where the engine was launched by another configuration than the pool has now."""
    known, digest = records.facts(CONFIGURATION).get(pool.pool_id), _digest(pool)
    if None not in (known, digest) and known != digest:
        yield f"Pool '{pool.pool_id}' still runs as an earlier configuration said; restart it to apply the present one"


def changed_files(pool_id: str, paths: Iterable[str]) -> Iterator[str]:
    """A sentence for each of these files, which are others now than at the launch."""
    for path in paths:
        yield f"Engine of pool '{pool_id}' still runs what {path} was at its start; it is another file now"


def _digest(pool: Pool) -> dict[str, str] | None:
    """Of the pool's configuration; None for a pool that has none."""
    return None if pool.config is None else {"digest": hashlib.sha256(pool.config.model_dump_json().encode()).hexdigest()}
