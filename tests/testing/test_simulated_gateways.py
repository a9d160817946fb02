"""Whether simulated runs find a gateway that does wrong by its leases: each mutant is found by a seed that finds nothing else."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterable, Mapping
from typing import Any

import pytest

from pool_managerd.core.demand.kept_leases import HeldLease, KeptLeases
from pool_managerd.gateway import leasing
from pool_managerd.gateway.directory import Directory
from pool_managerd.gateway.leasing import Leasing
from pool_managerd.gateway.node_link import NodeLink
from pool_managerd.node import PoolManager
from pool_managerd.testing.scenario import draw
from pool_managerd.testing.world import run

learn_all, take_once = Directory.learn, KeptLeases.take


async def never_return(self: Leasing, lease: HeldLease) -> None:
    """It is owed no more, and the daemon does not hear of it."""
    self._owed.pop(lease.lease_id, None)


async def never_renew(self: Leasing) -> None:
    await asyncio.Event().wait()


async def abandon(self: NodeLink, asking: asyncio.Future[dict[str, Any]]) -> None:
    """Who has gone waits on."""
    await asyncio.wait({asking})


def learn(self: Directory, told: Mapping[str, Any], *, whole: bool) -> None:
    """Nobody ever waits."""
    learn_all(self, {**told, "waiting": False}, whole=whole)


def take(self: KeptLeases, pool_ids: Iterable[str]) -> HeldLease | None:
    """What is taken is still there."""
    if (found := take_once(self, pool_ids)) is not None:
        self._idle[found.pool_id][found.lease_id] = (found, 0.0)
    return found


def gateway_is_gone(self: PoolManager, pid: int) -> None:
    """Its leases stay."""


MUTANTS: dict[str, tuple[object, str, object, int]] = {
    "a lease that nobody uses goes back": (Leasing, "_return", never_return, 0),
    "a lease lasts as long as it is used": (Leasing, "_renew", never_renew, 0),
    "whoever goes away does not wait": (NodeLink, "_abandon", abandon, 0),
    "a daemon that is soon back costs no request": (leasing, "_HEARD_S", math.inf, 0),
    "leases of a gateway that is gone are freed": (PoolManager, "gateway_is_gone", gateway_is_gone, 62),
    "nobody waits for what is only kept": (Directory, "learn", learn, 3),
    "a lease is one request at a time": (KeptLeases, "take", take, 7),
    "no drain waits for what is only kept": (KeptLeases, "_usable", lambda self, lease: True, 1415),
}


@pytest.mark.parametrize("rule", MUTANTS)
def test_a_gateway_that_breaks_a_rule_is_found(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    where, name, mutant, seed = MUTANTS[rule]
    assert run(draw(seed)).broken is None
    monkeypatch.setattr(where, name, mutant)
    outcome = run(draw(seed))
    assert outcome.broken is not None, "are scenarios drawn in another way now? take a seed that finds it"
    assert outcome.broken.rule == rule


def test_requests_through_a_gateway_are_answered_in_simulated_runs() -> None:
    """Else nothing would be found in them."""
    assert sum(line.endswith("was answered") for line in run(draw(3)).lines()) > 10
