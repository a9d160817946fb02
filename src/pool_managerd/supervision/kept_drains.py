"""Drains that are under way when their daemon ends: the next one goes on with them, to the deadline that they had."""

from __future__ import annotations

from pool_managerd.core.lifecycle import Instance, Phase
from pool_managerd.supervision.pool import Pool
from pool_managerd.supervision.protocols import Facts

DRAIN = "drain"
"""The kind of the facts about drains of pools, by pool id."""
RETIRING = "retiring"
"""The kind of those about instances that another one has replaced."""


def keep_drain(pool: Pool, before: Instance, facts: Facts) -> None:
    """The pool's instance was ``before`` until now."""
    was, now = (i.deadline if i.phase is Phase.DRAINING else None for i in (before, pool.instance))
    if now != was:
        kept = {
            "epoch": pool.instance.epoch,
            "since": pool.instance.drain_since,
            "deadline": now,
            "requests": pool.launch.requests,
        }
        facts.note_fact(_kind(pool), pool.pool_id, None if now is None else kept)


def kept_drain(pool: Pool, epoch: int, facts: Facts) -> tuple[float | None, float | None, int]:
    """Since when launch ``epoch`` drains, and until when, in monotonic seconds of this boot; None for what is not known. And how
    many requests of clients without a lease it had when it began to.
    """
    drain = facts.facts(_kind(pool)).get(pool.pool_id, {})
    if drain.get("epoch") != epoch:
        return None, None, 0
    return drain.get("since"), drain.get("deadline"), drain.get("requests", 0)


def forget_drain(pool_id: str, facts: Facts) -> None:
    """It is not gone on with."""
    facts.facts(DRAIN).pop(pool_id, None)
    facts.note_fact(DRAIN, pool_id, None)


def _kind(pool: Pool) -> str:
    return DRAIN if pool.current else RETIRING
