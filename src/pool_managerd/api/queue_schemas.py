"""Answers about requests that wait for a slot."""

from __future__ import annotations

from pydantic import Field

from pool_managerd.api.schemas import Answer


class MakesRoom(Answer):
    """One pool that would go, or whose requests would be waited for."""

    pool_id: str
    action: str
    in_flight: int
    idle_ms: int
    stop_ms: int | None = None
    load_again_ms: int | None = None


class Acquired(Answer):
    """A lease, or with ``?dry_run=true`` what asking for one would lead to."""

    lease_id: str | None = None
    pool_id: str
    url: str | None = Field(None, description="The engine that the lease is on: requests under it go there.")
    queued_ms: int | None = None
    started: bool | None = Field(None, description="It was not ready when it was asked for.")
    model: str | None = None
    state: str | None = None
    would: str | None = Field(None, description="What would happen, in a sentence.")
    stops: list[MakesRoom] | None = Field(None, description="Pools that would be stopped, or waited for.")
    load_ms: int | None = Field(None, description="How long its load takes, as measured.")
    waiting: int | None = None
    refused: str | None = Field(None, description="Why it would be refused.")
    hint: str | None = None


class Ticket(Answer):
    """One request that waits for a slot."""

    ticket_id: str
    pool_id: str
    holder: str | None = None
    priority: int
    place: int = Field(description="1 is next at its pool.")
    waited_ms: int
    left_ms: int
    estimate_ms: int | None = Field(None, description="What is left of its loading, as far as that was measured before.")
    state: str
    step: str | None = None
    waits_for: str


class TicketCancelled(Answer):
    ticket_id: str
    cancelled: bool
