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
    problem: str | None = Field(None, description="What would make it fail now; the other pools go on.")


class ApplyAnswer(Answer):
    """With ``dry_run`` the plan, else the operation, whose ``outcome`` has what became of each pool."""

    operation_id: str | None = None
    status: str | None = None
    progress: dict[str, Any] | None = None
    outcome: dict[str, Any] | None = None
    file: str | None = Field(None, description="The daemon's file.")
    replaces_file: bool | None = None
    digest: str | None = None
    would_change: bool | None = None
    pools: list[AppliedPool] | None = Field(None, description="Those that change or are not named, in order.")
    at_once: list[str] | None = Field(None, description="Keys that are taken over without touching a pool.")
    waiting: list[str] | None = Field(None, description="Keys that need another start of the daemon; they change nothing now.")
    without_effect: list[str] | None = Field(None, description="Keys that nothing reads in this version.")
    untouched: int | None = None
    forecast_duration_ms: int | None = None


class AppliedConfiguration(Answer):
    number: int
    at_ms: int
    origin: str = Field(description="start, apply, rollback, sighup or watch")
    summary: str
    pools: int
    kept: bool = Field(description="Whether it can be brought back.")
