"""The oracle of simulated gateways: what must hold of their leases and requests, by what the machine and the daemon know.

Where daemon or gateway were killed or paused a moment ago, times are measured from then on.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pool_managerd.core.demand.kept_leases import HeldLease
from pool_managerd.core.lifecycle import Phase
from pool_managerd.core.lifecycle.phase import SERVING
from pool_managerd.core.registry import Lease
from pool_managerd.errors import NodeError, PoolError
from pool_managerd.gateway.unanswered import asked_for
from pool_managerd.testing.scene import Scene
from pool_managerd.testing.simulated_machine import SimulatedEngine
from pool_managerd.testing.simulated_requests import SimulatedRequest

SLACK_S = 2.0
ANSWER_S = 10.0
"""So long an answer of the daemon is waited for."""
LOOK_S = 0.5
_LEASED = SERVING | {Phase.DRAINING}


@dataclass(frozen=True, slots=True)
class _Idle:
    """Since when a lease is in nobody's use, and how long it may be kept."""

    since: float
    limit_s: float


class GatewayRules:
    """Of one run. ``lost`` leases are those of which no gateway has heard."""

    def __init__(self, scene: Scene) -> None:
        self._scene = scene
        self._requests: dict[str, SimulatedRequest] = {}
        self._number, self._undisturbed = 0, 0.0
        self._ended: dict[int, float] = {}
        self._freed: dict[int, float] = {}
        self._lost: set[str] = set()
        self._done: dict[str, _Idle] = {}
        self._bad: dict[str, float] = {}
        self._held: dict[str, tuple[str, Lease]] = {}
        self._unready: dict[str, float] = {}
        self._served_at: dict[tuple[str, int], float] = {}
        self._looks = False
        self._stands_until = 0.0

    # --- what happens ---

    def begins(self, number: int) -> None:
        """A gateway does."""
        self._number = number
        self.disturbed(self._scene.timeline.now)

    def ended(self, number: int) -> None:
        """A gateway has, and all of its requests with it."""
        self._ended[number], self._number = self._scene.timeline.now, 0
        self._requests.clear()

    def freed(self, number: int) -> None:
        """The daemon is told of the end of that gateway."""
        self._freed[number] = self._scene.timeline.now

    def disturbed(self, until: float) -> None:
        """A gateway does nothing until then."""
        self._undisturbed = max(self._undisturbed, until)

    def asked(self, request: SimulatedRequest) -> None:
        self._requests[request.name] = request
        self._look_at_launches()
        self.watch()

    def over(self, request: SimulatedRequest, error: BaseException | None) -> None:
        self._requests.pop(request.name, None)
        if isinstance(error, PoolError) and error.code == NodeError.code:
            self._look_at_absence(request, error)

    def daemon_stands(self, until: float) -> None:
        """It is paused until then."""
        self._stands_until = until

    def _look_at_absence(self, request: SimulatedRequest, error: PoolError) -> None:
        """A daemon that is away for less than a request waits for it costs nobody an error."""
        scene, now = self._scene, self._scene.timeline.now
        there = scene.node is not None and now > scene.node_since + SLACK_S
        away_s = 0.0 if there else now - scene.away_since
        times, waited_s = self._traffic.times, now - request.waits_since
        stood = max(self._stands_until, self._undisturbed) > request.waits_since
        if away_s < times.away_s - SLACK_S and waited_s < times.wait_s and not stood:
            self._fail("a daemon that is soon back costs no request", f"{request}: {error!r}, away for {away_s:.3f} s")

    def live(self) -> list[SimulatedRequest]:
        """Requests in flight."""
        return list(self._requests.values())

    def lost(self, lease_id: str) -> None:
        """It was given, and the answer did not arrive."""
        self._lost.add(lease_id)

    def given(self, lease: HeldLease) -> None:
        """A request has it from now on. That its launch has ended takes a moment to be heard of."""
        seen_at = self._served_at.get((lease.pool_id, lease.epoch), self._scene.timeline.now)
        if self._scene.node is not None and not self._serves(lease, _LEASED) and self._over(seen_at, 0.0):
            self._fail("a request is given a slot of a launch that is there", str(lease))

    def served(self, request: SimulatedRequest, engine: SimulatedEngine) -> None:
        """The engine begins to answer it. That another one has come in the place of its own takes a moment to be heard of."""
        lease = request.lease
        other = lease is None or (engine.pool_id, engine.launch.epoch) != (lease.pool_id, lease.epoch)
        if other and self._over(engine.started_at, 0.0):
            self._fail("a request reaches the engine that its lease is on", f"{request}: {engine}")
        same = [one for one in self.live() if one.lease is not None and one.lease == lease]
        if len(same) > 1:
            self._fail("a lease is one request at a time", f"{same}")
        if lease is not None and not other:
            self._look_at_lease(lease, request)

    def _look_at_lease(self, lease: HeldLease, request: SimulatedRequest) -> None:
        """One that ran out while the gateway or the daemon stood is found to be over when it is renewed."""
        renewed_s = self._traffic.times.ttl_s / 4
        if self._serves(lease) and lease.lease_id not in dict(self._leases()) and self._over(self._quiet(), renewed_s):
            self._fail("a request is served under a lease", str(request))

    def _serves(self, lease: HeldLease, phases: frozenset[Phase] = SERVING) -> bool:
        """The launch is there, and gives leases, or is in one of ``phases``."""
        launches = [pool.instance for pool in self._scene.pools() if pool.pool_id == lease.pool_id]
        return any(i.epoch == lease.epoch and i.phase in phases for i in launches)

    def done(self, lease: HeldLease, *, broken: bool) -> None:
        """Its request has ended."""
        linger_s = 0.0 if broken else self._traffic.times.linger_s
        self._done[lease.lease_id] = _Idle(self._scene.timeline.now, linger_s)

    # --- looking ---

    def watch(self) -> None:
        """Look again and again, until nothing of a gateway is left."""
        if not self._looks:
            self._looks = True
            self._scene.timeline.after(LOOK_S, self._look_again)

    def _look_again(self) -> None:
        self._looks = False
        self.look()
        if self._scene.node is None or self._requests or self._held:
            self.watch()

    def look(self) -> None:
        """All that must be so now."""
        self._look_for_waits()
        if self._scene.node is None:
            return
        self._look_at_launches()
        before, self._held = self._held, dict(self._leases())
        in_use = {one.lease.lease_id: one for one in self.live() if one.lease is not None}
        for lease_id, (pool_id, lease) in self._held.items():
            if self._of(lease.holder) != self._number:
                self._look_at_left(pool_id, lease)
            elif lease_id not in in_use:
                self._look_at_kept(pool_id, lease)
        for lease_id, request in in_use.items():
            if lease_id in before and lease_id not in self._held:
                self._look_at_lost(request)
        self._look_at_queue()

    def _look_at_launches(self) -> None:
        """What takes leases, or may end some; leases of a pool that does not do so run out when it does again."""
        now, leased = self._scene.timeline.now, set[str]()
        for pool in self._scene.pools():
            if pool.instance.phase in _LEASED:
                leased.add(pool.pool_id)
                self._served_at[pool.pool_id, pool.instance.epoch] = now
        self._unready.update(dict.fromkeys({pool.pool_id for pool in self._scene.pools()} - leased, now))

    def _leases(self) -> Iterator[tuple[str, tuple[str, Lease]]]:
        node = self._scene.node
        for pool_id in [] if node is None else node.pool_ids():
            for lease in node.registry.leases(pool_id) if node is not None else ():
                if (lease.holder or "").startswith("gateway/"):
                    yield lease.lease_id, (pool_id, lease)

    def _look_at_left(self, pool_id: str, lease: Lease) -> None:
        """Of a gateway that is no more."""
        number = self._of(lease.holder)
        freed = self._freed.get(number)
        if freed is not None and lease.lease_id not in self._lost and self._over(freed, 0.0):
            self._fail("leases of a gateway that is gone are freed", str(lease))
        if self._over(max(self._ended[number], self._unready.get(pool_id, 0.0)), self._traffic.times.ttl_s):
            self._fail("leases of a gateway that is gone run out", str(lease))

    def _look_at_kept(self, pool_id: str, lease: Lease) -> None:
        """In nobody's use: it is kept, or on its way."""
        given_at = self._scene.timeline.now - (self._scene.timeline.wall_ms() - lease.given_at_ms) / 1000
        idle = self._done.get(lease.lease_id, _Idle(given_at, 0.0))
        ttl_s = self._traffic.times.ttl_s
        # One that must have run out is forgotten; a daemon that stood may hear of an earlier renewal first when it goes on.
        forgotten = lease.lease_id in self._lost or self._quiet() - idle.since > ttl_s
        limit_s = ttl_s if forgotten else idle.limit_s
        since = max(idle.since, self._unready.get(pool_id, 0.0))
        if self._over(since, limit_s):
            self._fail("a lease that nobody uses goes back", f"{pool_id}: {lease}, {idle}")
        if forgotten or not self._over(since, 0.0):
            return
        node, pool = self._scene.node, self._scene.pool(pool_id)
        if node is not None and any(row["waited_ms"] > SLACK_S * 1000 for row in node.queue()):
            self._fail("nobody waits for what is only kept", f"{pool_id}: {lease}, {node.queue()}")
        drains = pool is not None and pool.instance.phase is Phase.DRAINING
        if self._lasts(f"drain {lease.lease_id}", so=drains):
            self._fail("no drain waits for what is only kept", f"{pool_id}: {lease}")

    def _look_at_lost(self, request: SimulatedRequest) -> None:
        """Its lease was there a moment ago."""
        lease = request.lease
        if lease is not None and self._serves(lease) and self._over(self._quiet(), self._traffic.times.ttl_s):
            self._fail("a lease lasts as long as it is used", str(request))

    def _look_at_queue(self) -> None:
        node = self._scene.node
        for row in [] if node is None else node.queue():
            if (row["holder"] or "").startswith("gateway/"):
                name = asked_for(row["holder"]).rpartition("/")[2]
                waits = self._of(row["holder"]) == self._number and name in self._requests
                if self._lasts(row["ticket_id"], so=not waits):
                    self._fail("whoever goes away does not wait", str(row))

    def _look_for_waits(self) -> None:
        times = self._traffic.times
        limit_s = 2 * times.away_s + times.wait_s + ANSWER_S + SLACK_S
        for request in self.live():
            if request.lease is None and self._scene.timeline.now > max(request.waits_since, self._undisturbed) + limit_s:
                self._fail("nobody waits longer than they said", str(request))

    # --- inside ---

    @property
    def _traffic(self) -> Any:
        return self._scene.scenario.traffic

    def _of(self, holder: str | None) -> int:
        """The number of the gateway that has the lease."""
        return int((holder or "").split("/")[1].split("-")[0])

    def _quiet(self) -> float:
        """Since when nothing of both was killed or paused."""
        return max(self._undisturbed, self._scene.resumed_at, self._scene.node_since)

    def _over(self, since: float, limit_s: float) -> bool:
        return self._scene.timeline.now > max(since, self._quiet()) + limit_s + SLACK_S

    def _lasts(self, what: str, *, so: bool) -> bool:
        """It was so at every look for too long."""
        if not so:
            self._bad.pop(what, None)
            return False
        return self._over(self._bad.setdefault(what, self._scene.timeline.now), 0.0)

    def _fail(self, rule: str, what: str) -> None:
        self._scene.fail(rule, what)
