"""Answers about the daemon's configuration file being applied."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from pool_managerd.api.schemas import Answer


class AppliedPool(Answer):
    """One pool of a plan. The forecast is null where nothing was measured yet."""

    pool_id: str
    action: str = Field(description="keep, remove, take_over, reload, restart, start or add; in this order they are done.")
    why: str
    restarts: bool = Field(description="An engine of it is stopped.")
    changes: list[Any] = Field(description="{key, old, new} for each that is not the same, secrets masked.")
    strategy: str | None = None
    forecast_downtime_ms: int | None = None
    forecast_spread_ms: int | None = None
    forecast_duration_ms: int | None = None
    where: str | None = Field(None, description="Where it would run.")
    ends_by: str | None = Field(None, description="How the engine of one that is removed ends: drain, stop, or null without one.")
    drain_deadline_ms: int | None = Field(None, description="How long its leases are waited for at most, beside the forecast.")
    warnings: list[str] = Field(
        default_factory=list, description="Ports that it is given and that something else has, and whose."
    )
    problem: str | None = Field(None, description="What would make it fail now; the other pools go on.")


class ReloadedByHand(Answer):
    """A pool that stays what a reload has made of it, as the file says nothing new of it."""

    pool_id: str
    runs: bool = Field(description="It has an engine.")
    changes: list[Any] = Field(description="{key, old, new}: old is what it goes by, new what the file says, secrets masked.")


class ApplyAnswer(Answer):
    """With ``dry_run`` the plan, else the operation, whose ``outcome`` has what became of each pool."""

    operation_id: str | None = None
    status: str | None = None
    progress: dict[str, Any] | None = None
    outcome: dict[str, Any] | None = None
    file: str | None = Field(None, description="The daemon's file.")
    replaces_file: bool | None = None
    edits: str | None = Field(
        None, description="kept or lost: what becomes of edits of the file that were never applied; null where there are none."
    )
    digest: str | None = None
    would_change: bool | None = None
    pools: list[AppliedPool] | None = Field(None, description="Those that change or are not named, in order.")
    by_hand: list[ReloadedByHand] | None = Field(None, description="Pools that differ from the file by a reload, and stay so.")
    at_once: list[str] | None = Field(None, description="Keys that are taken over without touching a pool.")
    waiting: list[str] | None = Field(None, description="Keys that need another start of the daemon; they change nothing now.")
    without_effect: list[str] | None = Field(None, description="Keys that nothing reads in this version.")
    untouched: int | None = None
    forecast_duration_ms: int | None = None


class AppliedConfiguration(Answer):
    number: int
    at_ms: int
    origin: str = Field(description="start, apply, rollback, sighup or watch; edit: it was in the file, and never applied")
    summary: str
    pools: int
    result: str | None = Field(None, description="done, failed, not finished or not applied; null for a start")
    failed: int | None = Field(None, description="For how many pools; null where it did not come to its end.")
    kept: bool = Field(description="Whether it can be brought back.")
