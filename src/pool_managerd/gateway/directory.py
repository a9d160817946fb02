"""What the gateway knows of the node: which pools answer to which names, and how each is now."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

from pool_managerd.errors import RequestError

_MAX_NAME_PARTS = 16


@dataclass(frozen=True, slots=True)
class Place:
    """A pool as a route to its engine: the fields of a row of the node's routes."""

    pool_id: str
    name: str
    """What it is listed as; several pools may share it."""
    names: tuple[str, ...]
    state: str
    open: bool
    """It is ready, and takes requests."""
    loading: bool
    stays_down: bool
    epoch: int
    engine: str | None
    model_id: str | None
    engine_names: tuple[str, ...] | None
    ctx: int | None
    slots: int
    last_error: str | None
    rules: Mapping[str, Any] | None = None
    card: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Place:
        """Of one row, from any version of the daemon: what it does not say is not known."""
        names = row.get("engine_names")
        return cls(
            pool_id=row["pool_id"], name=str(row.get("name") or row["pool_id"]),
            names=tuple(row.get("names") or (row["pool_id"],)), state=str(row.get("state")),
            open=bool(row.get("ready") and not row.get("draining")), loading=bool(row.get("loading")),
            stays_down=bool(row.get("stays_down")), epoch=int(row.get("epoch") or 0), engine=row.get("engine"),
            model_id=row.get("model_id"), engine_names=None if names is None else tuple(names), ctx=row.get("ctx"),
            slots=int(row.get("slots") or 1), last_error=row.get("last_error"),
            rules=row.get("rules"), card=row.get("card") or {},
        )  # fmt: skip


class Directory:
    """Built up from what the node tells; empty before it has told anything (``known``)."""

    def __init__(self) -> None:
        self.known = False
        self.waiting = True
        self._places: dict[str, Place] = {}
        self._by_name: dict[str, tuple[str, ...]] = {}
        self.limits: dict[str, int] = {}
        """Of the pools that have one: requests that they may have at once."""

    def learn(self, told: Mapping[str, Any], *, whole: bool) -> None:
        """One event of the node's routes; ``whole``: the first of a connection, which has all of them."""
        places = {} if whole else self._places
        places.update({row["pool_id"]: Place.of(row) for row in told["pools"]})
        for pool_id in told["gone"]:
            places.pop(pool_id, None)
        self._places, self.waiting, self.known = places, bool(told["waiting"]), True
        limited = ((place.pool_id, (place.rules or {}).get("concurrency")) for place in places.values())
        self.limits = {pool_id: int(most) for pool_id, most in limited if most}
        named: dict[str, list[str]] = {}
        for place in places.values():
            for name in place.names:
                named.setdefault(name, []).append(place.pool_id)
        self._by_name = {name: (name,) if name in places else tuple(pools) for name, pools in named.items()}

    def pools(self, model: str) -> tuple[str, ...]:
        """Those that answer to this name: the one whose id it is, or all that have it. Raises RequestError MODEL_NOT_FOUND."""
        found = self._by_name.get(model)
        if found is None:
            known = ", ".join(sorted(self._by_name)) or "none"
            raise RequestError(
                f"model {model[:80]!r} not found", code="MODEL_NOT_FOUND", status=404, hint=f"models here: {known[:400]}"
            )
        return found

    def shared(self, model: str) -> bool:
        """Several pools answer to this name."""
        return len(self._by_name.get(model, ())) > 1

    def split(self, target: str) -> tuple[str, str]:
        """``MODEL/PATH?QUERY``, as it is in a URL, as the model and its engine's path. Names may have slashes: the longest
        that is known counts, else the first part.
        """
        path, mark, query = target.partition("?")
        parts = path.split("/")
        for count in range(min(len(parts), _MAX_NAME_PARTS), 0, -1):
            if (name := unquote("/".join(parts[:count]))) in self._by_name:
                return name, "/" + "/".join(parts[count:]) + mark + query
        return unquote(parts[0]), "/" + "/".join(parts[1:]) + mark + query

    def place(self, pool_id: str) -> Place | None:
        return self._places.get(pool_id)

    def all(self) -> Iterable[Place]:
        """All pools, by id."""
        return [self._places[pool_id] for pool_id in sorted(self._places)]

    def open_launches(self) -> dict[str, int]:
        """The launch of each pool that may be asked now."""
        return {place.pool_id: place.epoch for place in self._places.values() if place.open}
