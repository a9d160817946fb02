"""One pool's actor: a task, an inbox and a timer. The only writer of its pool's record (DESIGN §3).

It takes one message after the other, feeds the event to ``step``, starts the effects, and publishes the result. It never
awaits inside the loop: long work runs beside it (launch_work.py), and its outcome comes back as an event. Effects run
before the new state is published (core/lifecycle/table.py says why).
"""

from __future__ import annotations

import asyncio
from contextvars import Context, copy_context
from dataclasses import dataclass, fields, replace
from typing import Any

from pool_managerd import failpoints
from pool_managerd.core.lifecycle import Phase, PoolState, next_timer, step
from pool_managerd.core.lifecycle import effects as do
from pool_managerd.core.lifecycle import events as ev
from pool_managerd.core.lifecycle.phase import SERVING
from pool_managerd.core.lifecycle.replacing import candidate_beside, in_place_of
from pool_managerd.errors import PoolError, RequestError
from pool_managerd.supervision.announcement import Announcement
from pool_managerd.supervision.crash_reports import CrashReports, written
from pool_managerd.supervision.drain_watch import watch_drain
from pool_managerd.supervision.in_flight import in_hand
from pool_managerd.supervision.kept_drains import keep_drain
from pool_managerd.supervision.launch import Launch
from pool_managerd.supervision.launch_work import LaunchWork
from pool_managerd.supervision.log_places import place_of
from pool_managerd.supervision.made_of import keep_configuration
from pool_managerd.supervision.pool import Definition, Pool, Role
from pool_managerd.supervision.protocols import Timer
from pool_managerd.supervision.publishing import Publishing, log_context
from pool_managerd.supervision.reports import Reports
from pool_managerd.supervision.services import Services
from pool_managerd.supervision.settling import Waiting, refusal, settle
from pool_managerd.supervision.sleep_work import sleep_work
from pool_managerd.supervision.slot_work import slot_work

MAX_TASK_FAILURES = 5
_LEASED = SERVING | {Phase.DRAINING}
"""Where leases may be in flight: those of any other phase have ended with their launch."""


@dataclass(frozen=True, slots=True)
class Message:
    """An event for the pool. ``waiting`` is told when it is refused, and settled when its end is reached; ``definition`` is
    what the pool is to run from then on, unless the event is refused. ``context`` is the caller's (its correlation id): it
    goes along, and from there to all that follows.
    """

    event: ev.Event
    context: Context
    waiting: Waiting | None = None
    definition: Definition | None = None


class PoolActor:
    """Owns one pool."""

    def __init__(self, definition: Definition, state: PoolState, services: Services, role: Role = Role.CURRENT) -> None:
        self.pool = Pool(state.pool_id, definition, state, Launch(), role)
        self._s = services
        self._inbox: asyncio.Queue[Message] = asyncio.Queue()
        self._waiting: list[Waiting] = []
        self._timer: Timer | None = None
        self._boot = False
        self._reports = Reports(self.post, self.learn, self.emit)
        self._work = LaunchWork(self.pool, self._reports, services)
        self._crashes = CrashReports(self.pool, self.emit, services)
        self._files = Announcement(self.pool, self.emit, services)
        self._task_failures = 0
        self._shown = Publishing(self.pool, self.emit, services)
        self._task = asyncio.create_task(self._run(), name=f"pool:{state.pool_id}")
        self._shown.publish()

    # --- for the node ---

    def post(self, event: ev.Event, waiting: Waiting | None = None, definition: Definition | None = None) -> None:
        """Put ``event`` into the inbox."""
        self._inbox.put_nowait(Message(event, copy_context(), waiting, definition))

    def learn(self, epoch: int, *, tell: bool = False, **known: Any) -> bool:
        """Write down what is known of launch ``epoch`` now, and ``tell`` the registry; false when it is not the present one
        any more.
        """
        if self.pool.launch.epoch != epoch:
            return False
        self.pool.launch = replace(self.pool.launch, **known)
        if tell:
            self._shown.publish()
        return True

    def emit(self, type_: str, human: str, *, level: str = "info", **fields: Any) -> None:
        """Tell something that happened to the pool, with what every line about it carries."""
        who = "" if self.pool.current else f"{self.pool.role.capitalize()} {self.pool.instance_id.replica_id}: "
        told = {**log_context(self.pool), **fields}
        self._s.events.emit(type_, f"{who}{human}", level=level, pool_id=self.pool.pool_id, **told)

    def kill(self) -> None:
        """No more patience: the engine is killed at once; its end comes back as an event."""
        if self.pool.launch.process is not None:
            self.pool.launch.process.kill()

    def leases_changed(self, *, expiry: bool = False) -> None:
        """A lease was given or ended. ``expiry``: the timer may have to fire earlier now."""
        if expiry:
            self._arm()
        if self.pool.instance.phase is Phase.DRAINING:
            self.post(ev.LeasesChanged(in_hand(self.pool, self._s.registry)))

    def candidate(self) -> PoolState:
        """The state that a candidate for this one's place begins in."""
        self.pool.state, candidate = candidate_beside(self.pool.state, self.pool.instance_id, self.pool.definition.policy)
        return candidate

    def take_place(self, old: PoolActor, definition: Definition) -> None:
        """From now on this one is what the pool's id stands for, and ``old`` is retiring: in one step for every reader."""
        self.pool.state = in_place_of(old.pool.state, self.pool.state)
        self.pool.definition = definition
        old.pool.role, old.pool.successor, self.pool.role = Role.RETIRING, self.pool, Role.CURRENT
        self._shown.took_place()
        try:
            if self.pool.instance.phase in SERVING:  # it may have ended while its commit was written
                self._announce()
            old._files.retire()
        except PoolError as problem:
            self.emit("notice", problem.message, level="error", hint=problem.hint)
        keep_configuration(self.pool, self._s.records)
        self._arm()

    async def close(self, *, leave: bool = False) -> None:
        """End the task; effects still under way are cancelled. The engine must be down by now, or is to ``leave`` running."""
        tasks = [self._task, *self._work.tasks]
        for task in tasks:
            task.cancel()
        if self._timer is not None:
            self._timer.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if not leave:
            self.kill()
        pool_id = self.pool.pool_id
        if self.pool.current:
            self._s.silent.discard(pool_id)
        gone = RequestError(f"cannot go on: pool {pool_id} is closed", code="NODE_UNAVAILABLE", status=503, pool_id=pool_id)
        while not self._inbox.empty():
            if (waiting := self._inbox.get_nowait().waiting) is not None:
                waiting.refuse(gone)
        for waiting in self._waiting:
            if leave:  # the next daemon tells its end; whoever waits here is told that it goes on without them
                waiting.operation.finish(self._s.clock.wall_ms(), error=gone)
            else:
                waiting.on_end(waiting.operation, None, gone)
        self._waiting.clear()

    # --- the loop ---

    async def _run(self) -> None:
        while True:
            message = await self._inbox.get()
            try:
                message.context.run(self._apply, message)
            except Exception as problem:  # noqa: BLE001 - the task's boundary: one bad event must not silence the pool
                self._task_failures += 1
                pool_id = self.pool.pool_id
                doing = f"while pool '{pool_id}' handled {type(message.event).__name__}"
                told = self._s.events.fault(doing, problem, pool_id)
                if message.waiting is not None:
                    message.waiting.refuse(told)
                if self._task_failures == MAX_TASK_FAILURES:
                    self._s.on_fatal(problem)  # the task goes on: the pool must still be able to stop

    def _apply(self, message: Message) -> None:
        failpoints.reach("loop.pool")
        now = self._s.clock.monotonic()
        before, defined = self.pool.state, self.pool.definition
        definition = message.definition or defined
        event = self._completed(self._clean(message.event), now, anew=definition != defined)
        self.pool.state, effects = step(before, event, now, definition.policy)
        refused = None
        if any(isinstance(effect, do.Refuse) for effect in effects):
            refused = refusal(self.pool.pool_id, effects)
        if refused is None:
            self.pool.definition = definition
        self._crashes.decided(effects)
        try:
            for effect in effects:
                self._start(effect)
            if message.waiting is not None:
                self._answer(message.waiting, before, refused)
            changed = self._shown.stepped(before, event, defined_anew=self.pool.definition is not defined)
            keep_drain(self.pool, before.active, self._s.records)
            if self.pool.instance.phase is Phase.DRAINING and before.active.phase is not Phase.DRAINING:
                epoch = self.pool.instance.epoch
                self._work.run(watch_drain(self.pool, self._reports, self._s, epoch), epoch, "the watch of its drain")
            if changed or message.waiting is not None:
                self._waiting = [waiting for waiting in self._waiting if not settle(waiting, self.pool)]
        finally:
            self._arm()

    def _clean(self, event: ev.Event) -> ev.Event:
        """What engines and errors said enters the lifecycle, and all that is told of it, without secrets and endless words."""
        texts = {f.name: getattr(event, f.name) for f in fields(event)}
        cleaned = {name: self._s.events.clean(text) for name, text in texts.items() if isinstance(text, str) and len(text) > 1}
        return replace(event, **cleaned) if any(cleaned[name] != texts[name] for name in cleaned) else event

    def _completed(self, event: ev.Event, now: float, *, anew: bool) -> ev.Event:
        """What only holds at this moment: leases in flight, whether something else is to run than before, where it is stuck."""
        if isinstance(event, ev.Tick) and self.pool.state.active.phase in _LEASED:
            self._expire_leases(now)
        if isinstance(event, ev.Tick) and self.pool.instance.killed and self.pool.launch.process is not None:
            return ev.Tick(self._s.usages.stuck(self.pool.launch.process.pid))
        if isinstance(event, ev.Start):
            self._boot = event.origin == "boot"
            return replace(event, anew=anew)
        if isinstance(event, ev.Drain | ev.Sleep):
            self.learn(self.pool.launch.epoch, requests=event.in_flight)
        if isinstance(event, ev.Drain | ev.Sleep | ev.Evict | ev.Adopted):
            return replace(event, active_leases=in_hand(self.pool, self._s.registry))
        return event

    def _answer(self, waiting: Waiting, before: PoolState, refused: RequestError | None) -> None:
        if refused is not None:
            waiting.refuse(refused)
        else:
            waiting.accept(before, self.pool.state)
            self._waiting.append(waiting)

    def _expire_leases(self, now: float) -> None:
        pool_id = self.pool.pool_id
        for lease in self._s.registry.expire(pool_id, self.pool.instance.epoch, now):
            human = f"A lease on pool '{pool_id}' ran out and was taken back"
            self._s.events.emit("lease_expired", human, pool_id=pool_id, lease_id=lease.lease_id, holder=lease.holder)
            self.post(ev.LeasesChanged(in_hand(self.pool, self._s.registry)))

    def _arm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        due = next_timer(self.pool.state, self.pool.definition.policy)
        if self.pool.state.active.phase in _LEASED:
            expiry = self._s.registry.next_expiry(self.pool.pool_id, self.pool.instance.epoch)
            due = min((t for t in (due, expiry) if t is not None), default=None)
        if due is not None:
            self._timer = self._s.clock.call_at(due, self._fire)

    def _fire(self) -> None:
        self._inbox.put_nowait(Message(ev.Tick(), Context()))

    # --- effects: started here, never awaited ---

    def _start(self, effect: do.Effect) -> None:
        match effect:
            case do.Say():
                self._say(effect)
            case do.StageArtifacts(epoch):
                self.kill()  # a process that came up too late for the launch it belonged to
                queue, self._boot = self._boot, False
                self.pool.launch = self.pool.launch.next(epoch, "queue" if queue else "")
                self._work.run(self._work.stage(epoch, queue=queue), epoch, "the preparation")
            case do.SpawnEngine(epoch):
                self._s.slots.launching(self.pool, self.emit)
                self.learn(epoch, log_mark=self._s.files.log_mark(self.pool.instance_id))
                self.pool.log_places.launched(self._s.clock.wall_ms(), place_of(self.pool.launch.log_mark))
                self._work.run(self._work.spawn(epoch), epoch, "the launch")
            case do.SendProbe(epoch):
                self._look_at_files()
                self._work.run(self._work.probe(epoch), epoch, "the probe")
            case do.SendWarmup(epoch):
                self._work.run(self._work.warm_up(epoch), epoch, "the warm-up")
            case do.SlotEffect(epoch):
                self._work.run(slot_work(effect, self.pool, self._reports, self._s), epoch, "the work on its slots")
            case do.AwaitVram(epoch):
                waiting = self._s.gpus.wait_until_free(self.pool, epoch, self.pool.definition.policy.vram_wait_s, self.emit)
                self._work.run(waiting, epoch, "the watch of its GPU memory")
            case do.AdoptEngine(epoch):
                self.pool.launch = Launch(epoch)
                self._work.run(self._work.adopt(epoch), epoch, "the adoption")
            case do.SleepEngine(epoch) | do.WakeEngine(epoch):
                self._work.run(sleep_work(effect, self.pool, self._reports, self._s), epoch, "its sleep")
            case do.LaunchEffect():
                try:
                    self._do_now(effect)
                except PoolError as problem:
                    self._not_done(effect, problem)

    def _look_at_files(self) -> None:
        """At each probe of a ready engine."""
        if self.pool.state.active.phase is Phase.READY:
            self._files.put_back()
            mark = self._s.files.log_mark(self.pool.instance_id)
            self.pool.log_places.seen(self._s.clock.wall_ms(), place_of(mark))

    def _do_now(self, effect: do.LaunchEffect) -> None:
        """The effects that are done when this returns."""
        process, pool_id = self.pool.launch.process, self.pool.pool_id
        match effect:
            case do.CancelStaging(epoch):
                self._work.cancel(epoch)
            case do.WritePid(pid=pid):
                self._s.files.write_pid(self.pool.instance_id, pid)
            case do.Announce():
                launch = self.pool.launch
                if launch.ready_at == 0:
                    self.learn(launch.epoch, ready_at=written(self._s, self.pool.instance_id, launch.log_mark))
                self._announce()
                self._s.gpus.wake()
            case do.StopEngine(grace_ms=grace_ms) if process is not None:
                process.stop(grace_ms)
            case do.KillEngine() if process is not None:
                process.kill()
            case do.Withdraw():
                self._files.withdraw()
            case do.ReportCrash():
                self._shown.keep_counters()
                self._crashes.failed(effect)
            case do.EndLeases(epoch):
                self._s.registry.end_leases(pool_id, epoch)
            case do.ReleaseVram(epoch):
                self._s.gpus.release(self.pool.instance_id, epoch)

    def _announce(self) -> None:
        if (path := self._files.announce()) is not None:
            self.learn(self.pool.launch.epoch, handoff_path=str(path))

    def _not_done(self, effect: do.LaunchEffect, problem: PoolError) -> None:
        """The runtime directory is full or not ours any more. A launch whose pid cannot be written is ended (SPEC §6.1)."""
        self.emit("notice", problem.message, level="error", hint=problem.hint)
        if isinstance(effect, do.WritePid):
            self.learn(effect.epoch, cause=problem)
            self.post(ev.HelperDied(effect.epoch, problem.message))

    def _say(self, effect: do.Say) -> None:
        fields, state = dict(effect.fields), self.pool.state
        if effect.action == "crash":
            fields |= self._crashes.exited(effect)
        if "restart_in_s" in fields:
            fields["next_restart_at"] = self._s.clock.wall_ms() + round(float(str(fields.pop("restart_in_s"))) * 1000)
        if effect.action == "drain_finished":
            self.pool.last_drain = {"pool_id": state.pool_id, **fields}
        if effect.action in ("crash", "restart"):
            self._shown.keep_counters()
        self.emit(effect.action, effect.human, level=effect.level, **fields)
