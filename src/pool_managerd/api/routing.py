"""The shape of the route table: from one entry come the aiohttp routes and the OpenAPI operation."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from aiohttp import web
from pydantic import BaseModel

from pool_managerd.api.context import ApiContext

Handler = Callable[[ApiContext, web.Request], Awaitable[web.StreamResponse]]
PREFIXES = ("/v1", "/v2")


@dataclass(frozen=True, slots=True)
class Query:
    """A query parameter; ``schema`` is its JSON Schema."""

    name: str
    description: str
    schema: dict[str, object]


@dataclass(frozen=True, slots=True)
class Route:
    """One operation. Served under /v1 and /v2, and without a prefix where ``bare``; ``exempt`` needs no token;
    ``private`` shows text of engines or of the configuration, which on an open loopback is for the owner alone. ``asks_owner``:
    its handler has to know whether the caller is the daemon's own user, token or not.

    ``answers`` maps each success status to its model; ``many`` means a list of them. ``media`` other than JSON
    has no model. ``errors`` are the statuses this operation itself can end with; 401 and the like are added.
    """

    method: str
    path: str
    summary: str
    handler: Handler
    answers: dict[int, type[BaseModel] | None]
    errors: tuple[int, ...] = ()
    body: type[BaseModel] | None = None
    query: tuple[Query, ...] = ()
    many: bool = False
    bare: bool = False
    exempt: bool = False
    private: bool = False
    asks_owner: bool = False
    media: str = "application/json"

    @property
    def paths(self) -> tuple[str, ...]:
        """Every path it is served at, the canonical one first."""
        prefixed = tuple(prefix + self.path for prefix in PREFIXES)
        return (*prefixed, self.path) if self.bare else prefixed
