"""One pool's driver: a task, an inbox and an alarm. The only writer of its pool (DESIGN §3)."""

from __future__ import annotations

import asyncio
from contextvars import Context, copy_context
from dataclasses import fields, replace
from typing import Any

from pool_managerd.config import PoolConfig
from pool_managerd.core.artifacts import PreparedEngine
from pool_managerd.core.gpu.masks import DeviceMask
from pool_managerd.core.instance_id import InstanceId
from pool_managerd.core.intent import StoredPool
from pool_managerd.core.lifecycle import Instance, Phase, Policy, next_alarm, step, view
from pool_managerd.core.lifecycle import effects as do
from pool_managerd.core.lifecycle import events as ev
from pool_managerd.core.redaction import Redactor
from pool_managerd.errors import PoolError, RequestError, SpecError
from pool_managerd.supervision.launch_work import LaunchWork
from pool_managerd.supervision.log_places import LogPlaces
from pool_managerd.supervision.protocols import Alarm
from pool_managerd.supervision.publishing import log_context, registry_fields
from pool_managerd.supervision.services import Services
from pool_managerd.supervision.settling import Waiting, refusal, settle
from pool_managerd.supervision.workers import Launch

MAX_TASK_FAILURES = 5


class PoolDriver:
    """Feeds events to ``step``, starts the effects, publishes the result. It never awaits inside the loop."""

    def __init__(self, pool_id: str, config: PoolConfig | None, policy: Policy, services: Services) -> None:
        self.pool_id = pool_id
        self.config = config
        self.policy = policy
        self.submitted: PreparedEngine | None = None
        self.barred: PoolError | None = None
        """Why the engine that was submitted to an earlier daemon does not run."""
        self.instance = Instance(pool_id)
        self.launch = Launch()
        self.log_places = LogPlaces()
        self.last_drain: dict[str, Any] = {}
        self._boot = False
        self._s = services
        self._inbox: asyncio.Queue[tuple[ev.Event, Waiting | None, Context]] = asyncio.Queue()
        self._waiting: list[Waiting] = []
        self._alarm: Alarm | None = None
        self._work = LaunchWork(self, services)
        self._task_failures = 0
        self._task = asyncio.create_task(self._run(), name=f"pool:{pool_id}")
        self._publish()

    @property
    def redactor(self) -> Redactor:
        """What keeps the secrets of all pools out of what is told."""
        return self._s.events.redactor

    @property
    def mask(self) -> DeviceMask | None:
        """What its configuration, or the submitted engine, says about GPUs; None for none, and for one that is no mask."""
        try:
            return self.required_mask()
        except SpecError:  # a handoff file's mask is stored as it is, not validated
            return None

    def required_mask(self) -> DeviceMask | None:
        """As ``mask``; raises SpecError for a text that is no mask."""
        if self.submitted is not None:
            text = self.submitted.device_mask or self.submitted.env.get("CUDA_VISIBLE_DEVICES")
            return None if text is None else DeviceMask.parse(text)
        return self.config.mask if self.config is not None else None

    @property
    def instance_id(self) -> InstanceId:
        """The replica whose files these are: the present launch's, else that of the engine that was submitted."""
        engine = self.launch.prepared or self.submitted
        return InstanceId(self.pool_id) if engine is None else engine.instance_id

    @property
    def external(self) -> bool:
        """True for an engine that somebody else runs."""
        if self.submitted is not None:
            return self.submitted.attach_url is not None
        return self.config is not None and self.config.provisioning.mode == "external"

    # --- for the node ---

    def post(self, event: ev.Event, waiting: Waiting | None = None) -> None:
        """Put ``event`` into the inbox. ``waiting`` is told when it is refused, and settled when its end is reached.

        The caller's context (its correlation id) goes along, and from there to all that follows.
        """
        self._inbox.put_nowait((event, waiting, copy_context()))

    def restore(self, stored: StoredPool, *, owed: bool) -> None:
        """What an earlier daemon knew; before the first event. ``owed``: a held pool that would start were it not held."""
        self.instance = replace(
            self.instance, crash_count=stored.crash_count, restart_count=stored.restart_count,
            held=stored.held, owed=owed, drained=stored.desired == "down",
            last_error=None if self.barred is None else self._s.events.clean(self.barred.message),
        )  # fmt: skip
        self._publish()

    def kill(self) -> None:
        """No more patience: the engine is killed at once; its end comes back as an event."""
        if self.launch.process is not None:
            self.launch.process.kill()

    def leases_changed(self, *, expiry: bool = False) -> None:
        """A lease was given or ended. ``expiry``: the alarm may have to ring earlier now."""
        if expiry:
            self._arm()
        if self.instance.phase is Phase.DRAINING:
            self.post(ev.LeasesChanged(self._s.registry.get_active_leases(self.pool_id)))

    def up_outcome(self) -> dict[str, Any]:
        """What a finished preload answers (SPEC §6.1): pool_id, pid, handoff_path."""
        pid = self.launch.process.pid if self.launch.process else None
        return {"pool_id": self.pool_id, "pid": pid, "handoff_path": self.launch.handoff_path}

    async def close(self) -> None:
        """End the task; effects still under way are cancelled. The engine must be down by now."""
        tasks = [self._task, *self._work.tasks]
        for task in tasks:
            task.cancel()
        if self._alarm is not None:
            self._alarm.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self.kill()
        self._s.silent.discard(self.pool_id)
        gone = RequestError(
            f"cannot go on: pool {self.pool_id} is closed", code="NODE_UNAVAILABLE", status=503, pool_id=self.pool_id
        )
        while not self._inbox.empty():
            if (waiting := self._inbox.get_nowait()[1]) is not None:
                waiting.refuse(gone)
        for waiting in self._waiting:
            waiting.on_end(waiting.operation, None, gone)
        self._waiting.clear()

    # --- the loop ---

    async def _run(self) -> None:
        while True:
            event, waiting, context = await self._inbox.get()
            try:
                context.run(self._apply, event, waiting)
            except Exception as problem:  # noqa: BLE001 - the task's boundary: one bad event must not silence the pool
                self._task_failures += 1
                human = f"Internal error while pool '{self.pool_id}' handled {type(event).__name__}: {problem!r}"
                self._s.events.emit("internal_error", human, level="critical", pool_id=self.pool_id)
                if waiting is not None:
                    waiting.refuse(PoolError(human, pool_id=self.pool_id))
                if self._task_failures == MAX_TASK_FAILURES:
                    self._s.on_fatal(problem)  # the task goes on: the pool must still be able to stop

    def _apply(self, event: ev.Event, waiting: Waiting | None) -> None:
        now = self._s.clock.monotonic()
        before, seen = self.instance, view(self.instance)
        event = self._clean(event)
        if isinstance(event, ev.Drain):
            event = replace(event, active_leases=self._s.registry.get_active_leases(self.pool_id))
        if isinstance(event, ev.Tick):
            self._expire_leases(now)
        if isinstance(event, ev.Start):
            self._boot = event.origin == "boot"
        self.instance, effects = step(before, event, now, self.policy)
        try:
            self._carry_out(before, seen.state, event, effects, waiting)
        finally:
            self._arm()

    def _clean(self, event: ev.Event) -> ev.Event:
        """What engines and errors said enters the lifecycle, and all that is told of it, without secrets and endless words."""
        texts = {f.name: getattr(event, f.name) for f in fields(event)}
        cleaned = {name: self._s.events.clean(text) for name, text in texts.items() if isinstance(text, str) and len(text) > 1}
        return replace(event, **cleaned) if any(cleaned[name] != texts[name] for name in cleaned) else event

    def _carry_out(
        self, before: Instance, was: str, event: ev.Event, effects: tuple[do.Effect, ...], waiting: Waiting | None
    ) -> None:
        for effect in effects:
            self._start(effect)
        refused = refusal(self.pool_id, effects)
        if refused is not None and waiting is not None:
            waiting.refuse(refused)
        elif waiting is not None:
            waiting.accept(before, self.instance)
            self._waiting.append(waiting)
        if self.instance is not before:
            self._publish()
            self._tell_transition(was, event)
        self._settle()

    def _settle(self) -> None:
        if self._waiting:
            self._waiting = [w for w in self._waiting if not settle(w, self.instance, self)]

    def _expire_leases(self, now: float) -> None:
        for lease in self._s.registry.expire(self.pool_id, now):
            human = f"A lease on pool '{self.pool_id}' ran out and was taken back"
            self._s.events.emit("lease_expired", human, pool_id=self.pool_id, lease_id=lease.lease_id, holder=lease.holder)
            self.post(ev.LeasesChanged(self._s.registry.get_active_leases(self.pool_id)))

    def _arm(self) -> None:
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None
        times = (next_alarm(self.instance, self.policy), self._s.registry.next_expiry(self.pool_id))
        due = min((t for t in times if t is not None), default=None)
        if due is not None:
            self._alarm = self._s.clock.call_at(due, self._ring)

    def _ring(self) -> None:
        self._inbox.put_nowait((ev.Tick(), None, Context()))

    # --- what others see ---

    def _publish(self) -> None:
        now_ms = self._s.clock.wall_ms()
        fields = registry_fields(self.instance, self.launch, self.config, now_ms, self._s.node_id, self._s.models.id_of)
        self._s.registry.publish(self.pool_id, **fields)
        if self.instance.phase not in (Phase.STAGING, Phase.STARTING, Phase.WARMING):
            self._s.gate.leave(self.pool_id)
        if self.instance.phase is not Phase.ATTACHED:
            self._s.silent.discard(self.pool_id)

    def _tell_transition(self, from_state: str, event: ev.Event) -> None:
        state = view(self.instance).state
        if state != from_state:
            fields = {"from_state": from_state, "to_state": state, "reason": self.instance.reason, "event": type(event).__name__}
            self.emit("transition", f"Pool '{self.pool_id}' is {state} now (was {from_state})", level="debug", **fields)

    def emit(self, type_: str, human: str, *, level: str = "info", **fields: Any) -> None:
        context = log_context(self.instance, self.launch, self.config)
        self._s.events.emit(type_, human, level=level, pool_id=self.pool_id, **{**context, **fields})

    # --- effects: started here, never awaited ---

    def _start(self, effect: do.Effect) -> None:
        match effect:
            case do.Say():
                self._say(effect)
            case do.StageArtifacts():
                self.kill()  # a process that came up too late for the launch it belonged to
                self.launch = Launch(first_token_ms=self.launch.first_token_ms, tokens_per_s=self.launch.tokens_per_s)
                self._work.run(self._work.stage(effect.epoch, queue=self._boot), effect.epoch, "the preparation")
                self._boot = False
            case do.SpawnEngine():
                self._work.run(self._work.spawn(effect.epoch), effect.epoch, "the launch")
            case do.SendProbe():
                self._work.run(self._work.probe(effect.epoch), effect.epoch, "the probe")
            case do.SendWarmup():
                self._work.run(self._work.warm_up(effect.epoch), effect.epoch, "the warm-up")
            case do.AwaitVram():
                waiting = self._s.gpus.wait_until_free(self, effect.epoch, self.policy.vram_wait_s)
                self._work.run(waiting, effect.epoch, "the watch of its GPU memory")
            case do.SleepEngine() | do.WakeEngine() | do.AdoptEngine():
                self.post(ev.HelperDied(effect.epoch, "this engine does not support it"))
            case _:
                try:
                    self._do_now(effect)
                except PoolError as problem:
                    self._not_done(effect, problem)

    def _do_now(self, effect: do.Effect) -> None:
        """The effects that are done when this returns."""
        process = self.launch.process
        match effect:
            case do.CancelStaging():
                self._work.cancel(self.launch)
            case do.WritePid():
                self._s.files.write_pid(self.instance_id, effect.pid)
            case do.Announce():
                self._announce()
                self._s.gpus.watch.wake()
            case do.StopEngine() if process is not None:
                process.stop(effect.grace_ms)
            case do.KillEngine() if process is not None:
                process.kill()
            case do.Withdraw():
                self._withdraw()
            case do.EndLeases():
                self._s.registry.end_leases(self.pool_id)
            case do.ReleaseVram():
                self._s.gpus.release(self.pool_id, effect.epoch)

    def _not_done(self, effect: do.Effect, problem: PoolError) -> None:
        """The runtime directory is full or not ours any more. A launch whose pid cannot be written is ended (SPEC §6.1)."""
        self.emit("notice", problem.message, level="error", hint=problem.hint)
        if isinstance(effect, do.WritePid):
            self.launch.cause = problem
            self.post(ev.HelperDied(effect.epoch, problem.message))

    def _say(self, effect: do.Say) -> None:
        fields = dict(effect.fields)
        if effect.action == "crash":
            fields |= {"log_tail": self.launch.log_tail, "crash_class": "signal" if fields.get("signal") else "process_exit"}
        if "restart_in_s" in fields:
            fields["next_restart_at"] = self._s.clock.wall_ms() + round(float(str(fields.pop("restart_in_s"))) * 1000)
        if effect.action == "drain_finished":
            self.last_drain = {"pool_id": self.pool_id, **fields}
        if effect.action in ("crash", "restart", "unhealthy"):
            self._s.records.note_counters(self.pool_id, self.instance.crash_count, self.instance.restart_count)
        self.emit(effect.action, effect.human, level=effect.level, **fields)

    def _announce(self) -> None:
        prepared = self.launch.prepared
        if prepared is None or self._announced_by_others():
            return
        pid = self.launch.process.pid if self.launch.process else 0
        path = self._s.files.write_handoff(prepared, pid, written_at_ms=self._s.clock.wall_ms())
        self.launch.handoff_path = str(path)

    def _announced_by_others(self) -> bool:
        """The handoff file is theirs: neither written nor removed here."""
        return self.config is None and self.submitted is not None and self.submitted.attach_url is not None

    def _withdraw(self) -> None:
        """The pid file is gone before ``live`` turns false (DESIGN §7)."""
        self._s.files.remove_pid(self.instance_id)
        if self.launch.prepared is not None and not self._announced_by_others():
            self._s.files.remove_handoff(self.launch.prepared.instance_id)
