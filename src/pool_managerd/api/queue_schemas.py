"""Answers about requests that wait for a slot."""

from __future__ import annotations

from typing import Any

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
    epoch: int | None = Field(None, description="The launch of that engine.")
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


class YieldingPool(Answer):
    """One pool that is still on a GPU that is left to others."""

    pool_id: str
    state: str
    in_flight: int = Field(description="Requests, whose end is waited for.")


class Yielded(Answer):
    """A GPU that is left to others for a while."""

    device: str
    uuid: str
    since_ms: int
    until_ms: int | None = Field(None, description="Null: until it is taken back.")
    pools: list[YieldingPool]


class RouteRow(Answer):
    """One pool as a router sees it."""

    pool_id: str
    name: str = Field(description="What it is listed as: its served name, or its id. Several pools may share it.")
    names: list[str] = Field(description="All that requests may call it by, its id first.")
    state: str
    ready: bool
    draining: bool
    loading: bool
    stays_down: bool = Field(description="A person does not want it: nobody's request starts it.")
    epoch: int = Field(description="Its launch; leases are given on one, and end with it.")
    url: str | None = None
    engine: str | None = None
    model_id: str | None = None
    engine_names: list[str] | None = Field(None, description="Of an engine that refuses others: what its model is called there.")
    ctx: int | None = None
    slots: int
    rules: dict[str, Any] | None = Field(None, description="What is to be changed in requests: pools[].requests.")
    card: dict[str, Any] | None = Field(None, description="How lists of models show it: pools[].card.")
    last_error: str | None = None


class RouteTable(Answer):
    """What a router has to know."""

    pools: list[RouteRow]
    gone: list[str] = Field(description="In the stream: pools that are no more.")
    waiting: bool = Field(description="Somebody waits for a slot or for room: leases that are not in use are to come back.")


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
