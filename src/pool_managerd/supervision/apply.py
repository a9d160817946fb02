"""Another configuration taken over by a node that runs: only the pools that it changes are touched (the rules: config/plan.py).

Each pool goes its own way, by the transactions that a person has, too: what fails with one leaves the others as they are. What
a pool's reload could not reach is not in force: what ran before goes on, and the status says so. Memory is freed before it is
needed: what goes comes first, then what changes (what needs less than before first), then what is new.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from pool_managerd import failpoints
from pool_managerd.config import Config
from pool_managerd.config.plan import Action, Plan, Step, plan_of, with_pool, with_sections, without_pool
from pool_managerd.core.narration import count
from pool_managerd.errors import PoolError, RequestError
from pool_managerd.supervision import policy
from pool_managerd.supervision.apply_order import in_order
from pool_managerd.supervision.apply_steps import ApplySteps, pool_now
from pool_managerd.supervision.apply_view import ApplyView
from pool_managerd.supervision.operations import Operation
from pool_managerd.supervision.pools import Pools
from pool_managerd.supervision.precedence import Wanted
from pool_managerd.supervision.reload import Reloads
from pool_managerd.supervision.services import Services

UseConfig = Callable[[Config], None]
MAX_NAMED = 5


@dataclass(frozen=True, slots=True)
class ApplyOptions:
    """``prune``: pools that the configuration does not name go. ``expect`` is the digest of the plan that was agreed to.

    ``first`` is done once nothing stands in the way any more, and before anything changes; where it raises, nothing has.
    ``last`` is told at the end for how many pools it failed; not where the daemon ends before. ``mark`` is what the digest has to
    end with, of what the caller has shown beside the plan.
    """

    prune: bool = False
    expect: str | None = None
    first: Callable[[Plan], Awaitable[None]] | None = None
    last: Callable[[int], None] | None = None
    mark: str = ""


@dataclass
class _Apply:
    """One that is under way. ``pools`` is what became of each so far."""

    plan: Plan
    operation: Operation
    pools: dict[str, dict[str, Any]] = field(default_factory=dict)

    def told(self) -> dict[str, Any]:
        return {
            "pools": self.pools, "kept": [s.pool_id for s in self.plan.steps if s.action is Action.KEEP],
            "at_once": list(self.plan.at_once), "waiting": list(self.plan.waiting), "untouched": self.plan.untouched,
        }  # fmt: skip

    def failed(self) -> dict[str, str]:
        return {pool_id: str(row["error"]) for pool_id, row in self.pools.items() if row["status"] == "failed"}


class Applies:
    """Of one node, one at a time. ``config`` is what is in force, ``use_config`` has another one be so."""

    def __init__(
        self, pools: Pools, services: Services, reloads: Reloads, config: Callable[[], Config], use_config: UseConfig
    ) -> None:
        self._pools, self._s, self._config, self._use_config = pools, services, config, use_config
        self._view = ApplyView(pools, services, reloads, config)
        self._steps = ApplySteps(pools, services, reloads, config)
        self._running = False
        self._task: asyncio.Task[None] | None = None
        self._unapplied: dict[str, str] = {}
        self._steps_now: tuple[Step, ...] = ()
        pools.other_needs.append(self._needs)

    @property
    def busy(self) -> bool:
        """One is under way."""
        return self._running

    def unapplied(self, pool_id: str) -> str | None:
        """Why what was last applied of the pool is not in force; None where it is."""
        return self._unapplied.get(pool_id)

    async def plan(self, new: Config, *, prune: bool = False) -> dict[str, Any]:
        """What applying ``new`` would do, in order; nothing happens. Raises RequestError for what would be refused as a whole."""
        self._check_alone()
        plan = await in_order(self._plan(new, prune), self._pools, self._s)
        self._check(plan)
        return await self._view.of(plan, new.lifecycle.drain_deadline_ms)

    async def begin(self, new: Config, options: ApplyOptions) -> Operation:
        """Accept it; its end is the operation's. Raises RequestError OPERATION_IN_PROGRESS, PLAN_CHANGED, and as ``first``."""
        try:
            apply = await self._accepted(new, options)
        except PoolError:
            self._count("refused")
            raise
        self._task = asyncio.create_task(self._run(apply, new, options), name="apply")
        await self._pools.operations.kept()
        return apply.operation

    async def _accepted(self, new: Config, options: ApplyOptions) -> _Apply:
        self._check_alone()
        self._running = True
        try:
            plan = await in_order(self._plan(new, options.prune), self._pools, self._s)
            self._check(plan)
            self._steps_now = plan.steps
            if options.expect not in (None, plan.digest + options.mark):
                raise RequestError(
                    "cannot apply it: what it would do is not what was shown, something has changed since", code="PLAN_CHANGED",
                    status=409, retriable=True, hint="look at the plan again",
                )  # fmt: skip
            if options.first is not None:
                await options.first(plan)
            apply = _Apply(plan, self._pools.operations.begin("apply", ""))
            apply.operation.progress = {
                "done": 0, "total": sum(s.action is not Action.KEEP for s in plan.steps), "pool_id": None,
                "summary": summary(plan), "waiting": list(plan.waiting),
            }  # fmt: skip
        except BaseException:
            self._running, self._steps_now = False, ()
            raise
        return apply

    def _needs(self) -> list[Wanted]:
        """What it brings that is not in force yet."""
        return [Wanted(step.pool_id, "is being changed to it", step.config) for step in self._steps_now]

    async def close(self) -> None:
        """The daemon ends: what is not done is left to the next one, which goes by its file."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    # --- what is to be done ---

    def _plan(self, new: Config, prune: bool) -> Plan:
        old = self._config()
        found = (pool_now(pool, self._pools, self._s) for one in old.pools if (pool := self._pools.find(one.id)) is not None)
        now = {one.config.id: one for one in found if one is not None}
        return plan_of(old, new, now, prune=prune)

    def _check_alone(self) -> None:
        """A plan beside another apply would say what is so in the middle of that, and take its reloads for a person's."""
        if self._running:
            raise RequestError(
                "cannot apply a configuration: another one is being applied", code="OPERATION_IN_PROGRESS", status=409,
                retriable=True, hint="pool-managerd operations shows how far it is",
            )  # fmt: skip

    def _check(self, plan: Plan) -> None:
        """Raises RequestError where one of the pools stands in the way of the whole."""
        if self._pools.closing:
            raise RequestError("cannot apply it: the daemon is shutting down", code="NODE_UNAVAILABLE", status=503)
        touched = [step.pool_id for step in plan.steps if step.action is not Action.KEEP]
        for pool_id in self._pools.ids() if plan.changes_rules else touched:
            if self._pools.precedence.has(pool_id):
                raise RequestError(
                    f"cannot apply it: pool '{pool_id}' is being reloaded", code="OPERATION_IN_PROGRESS", status=409,
                    pool_id=pool_id, retriable=True, hint="wait for the reload to end",
                )  # fmt: skip
        for step in plan.steps:
            known = self._pools.find(step.pool_id) if step.action is Action.ADD else None
            if known is not None and (known.submitted is not None or known.instance.has_process):
                raise RequestError(
                    f"cannot apply it: pool '{step.pool_id}' is there already, with an engine that a request or a handoff file"
                    " gave it", status=409, pool_id=step.pool_id, hint="stop and remove it (`rm`), or choose another id",
                )  # fmt: skip

    # --- doing it ---

    async def _run(self, apply: _Apply, new: Config, options: ApplyOptions) -> None:
        try:
            await self._carry_out(apply, new)
            if options.last is not None:
                options.last(len(apply.failed()))
            self._finish(apply)
        except asyncio.CancelledError:
            gone = RequestError("cannot tell how it ended: the daemon is shutting down", code="NODE_UNAVAILABLE", status=503)
            self._pools.operations.finish(apply.operation, error=gone)
            raise
        except Exception as problem:  # noqa: BLE001 - the task's boundary: whoever waits must be told
            self._count("failed")
            self._pools.operations.finish(
                apply.operation, error=self._s.events.fault("while a configuration was applied", problem)
            )
        finally:
            self._running, self._steps_now = False, ()

    async def _carry_out(self, apply: _Apply, new: Config) -> None:
        todo = [step for step in apply.plan.steps if step.action is not Action.KEEP]
        human = f"A configuration is applied: {summary(apply.plan)}"
        operation_id = apply.operation.operation_id
        self._s.events.emit("apply_started", human, operation_id=operation_id, waiting=list(apply.plan.waiting))
        self._unapplied = {k: why for k, why in self._unapplied.items() if any(s.pool_id == k for s in apply.plan.steps)}
        self._use_config(with_sections(self._config(), new))
        if apply.plan.changes_rules:
            await self._change_rules()
        failpoints.reach("apply.begun")
        for step in todo:
            if step.action is not Action.ADD:
                await self._one(apply, step)
        added = [step for step in todo if step.action is Action.ADD]
        for step in added:
            self._placed(step)
        await asyncio.gather(*(self._one(apply, step) for step in added))

    async def _one(self, apply: _Apply, step: Step) -> None:
        """Done, or not: it is written down which, and the next one's turn."""
        self._tell(apply, step)
        try:
            outcome: Mapping[str, Any] = await self._steps.do(step)
            row = {"action": step.action.value, "status": "succeeded", **outcome}
        except PoolError as problem:
            told = self._s.events.clean_error(problem).message.removeprefix("reload failed: ")
            rolled_back = problem.details.get("rolled_back")
            row = {"action": step.action.value, "status": "failed", "error": told, "rolled_back": rolled_back}
        apply.pools[step.pool_id] = row
        pool, done = self._pools.find(step.pool_id), row["status"] == "succeeded"
        if pool is None or (pool.config == step.config if step.said else done):
            self._placed(step if pool is not None else replace(step, config=None))
        else:
            self._unapplied[step.pool_id] = f"what the file says of it is not in force: {row.get('error')}"
        failpoints.reach("apply.step")

    def _placed(self, step: Step) -> None:
        """What the configuration says of the pool is in force from now on."""
        self._unapplied.pop(step.pool_id, None)
        config = self._config()
        self._use_config(without_pool(config, step.pool_id) if step.config is None else with_pool(config, step.config))

    def _tell(self, apply: _Apply, step: Step) -> None:
        progress = apply.operation.progress or {}
        apply.operation.progress = {**progress, "done": len(apply.pools), "pool_id": step.pool_id, "action": step.action.value}

    async def _change_rules(self) -> None:
        """Every pool goes by the new rules from now on; what runs goes on."""
        config = self._config()
        for pool in self._pools.all():
            known = pool.definition
            rules = policy.policy_for(config, pool.pool_id, known.config, self._s.node_id, known.submitted)
            if rules != known.policy:
                await self._steps.define(pool, replace(known, policy=rules))

    def _count(self, outcome: str) -> None:
        self._s.events.emit("apply", f"A configuration was {outcome}", journal=False, outcome=outcome)

    def _finish(self, apply: _Apply) -> None:
        failed, touched = apply.failed(), len(apply.pools)
        self._count("failed" if failed else "applied" if apply.plan.would_change else "unchanged")
        if not failed:
            human = f"The configuration is applied; {count(touched, 'pool')} touched, {apply.plan.untouched} not"
            self._s.events.emit("apply_finished", human, operation_id=apply.operation.operation_id, outcome="success")
            self._pools.operations.finish(apply.operation, apply.told())
            return
        first, why = next(iter(failed.items()))
        error = PoolError(
            f"apply failed for {len(failed)} of {count(touched, 'pool')} ({', '.join(sorted(failed))}), the others stand:"
            f" pool '{first}': {why}", code="APPLY_FAILED",
            hint="correct the file and apply it again, or bring an earlier one back (pool-managerd config history)",
            details=apply.told(),
        )  # fmt: skip
        human = f"The configuration is not applied as a whole: {error.message}"
        self._s.events.emit(
            "apply_finished", human, level="error", operation_id=apply.operation.operation_id, outcome="error",
            failed=sorted(failed),
        )  # fmt: skip
        self._pools.operations.finish(apply.operation, error=error)


_VERBS = {
    Action.REMOVE: "remove", Action.TAKE_OVER: "change without a restart", Action.RELOAD: "reload",
    Action.RESTART: "stop and start", Action.START: "start", Action.ADD: "add", Action.KEEP: "keep, though not named,",
}  # fmt: skip


def summary(plan: Plan) -> str:
    """What a plan does in a few words, as in ``reload chat, code; add tiny``."""
    told = []
    for action, verb in _VERBS.items():
        ids = [step.pool_id for step in plan.steps if step.action is action]
        if ids:
            more = f" and {len(ids) - MAX_NAMED} more" if len(ids) > MAX_NAMED else ""
            told.append(f"{verb} {', '.join(ids[:MAX_NAMED])}{more}")
    if sections := sorted({key.partition(".")[0] for key in plan.at_once}):
        told.append(f"take over {', '.join(sections)}")
    return "; ".join(told) or "no pool changes"
