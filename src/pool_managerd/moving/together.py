"""Which models may be loaded together: groups, or the sets of a matrix, and who of those that preload may."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from pool_managerd.config.parse import KeyPath
from pool_managerd.moving.draft import Draft
from pool_managerd.moving.matrix import TooManyError, expanded
from pool_managerd.moving.names import Names
from pool_managerd.moving.report import Findings
from pool_managerd.moving.source import Source

MAX_WEIGHT = 1_000
_NESTED: KeyPath = ("routing", "router", "settings")
_DEFAULT = (
    "llama-swap keeps one of these loaded at a time. Here memory decides who makes room: without this group, models stay loaded"
    " together where they fit."
)
_EXTERNAL = "an external engine is loaded when somebody else says so"


@dataclass(slots=True)
class Rules:
    """``section`` is ours; ``notes`` are comments by key path; ``weights`` the eviction weights by pool."""

    section: dict[str, Any] = field(default_factory=dict)
    notes: dict[KeyPath, list[str]] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)

    def apart(self, one: str, other: str) -> bool:
        """Whether loading one of two pools would end the other."""
        if sets := self.section.get("sets"):
            return not any(one in pools and other in pools for pools in sets)
        groups = self.section.get("groups", [])
        none: dict[str, Any] = {}
        mine = next((group for group in groups if one in group["pools"]), none)
        its = next((group for group in groups if other in group["pools"]), none)
        if mine and mine is its:
            return bool(mine.get("swap", True))
        return any(a.get("exclusive", False) and not b.get("persistent", False) for a, b in ((mine, its), (its, mine)))


class RulesMover:
    """Moves ``groups`` or the matrix, wherever they stand. ``drafts`` are the pools by model."""

    def __init__(self, source: Source, findings: Findings, names: Names, drafts: dict[str, Draft]) -> None:
        self._source, self._findings, self._names, self._drafts = source, findings, names, drafts
        self._rules = Rules()

    def move(self) -> Rules:
        groups, matrix = self._chosen()
        if matrix is not None:
            self._matrix(matrix)
        else:
            self._groups(groups)
        return self._rules

    def _chosen(self) -> tuple[KeyPath | None, KeyPath | None]:
        """Where the groups are, or the matrix that is in force. Raises SpecError where llama-swap would not start."""
        source = self._source
        old = [("groups",), ("matrix",)]
        new: list[KeyPath] = [(*_NESTED, "groups"), (*_NESTED, "matrix")]
        for path in (*old, *new, ("routing",), ("routing", "router"), _NESTED):
            source.mapping(path)
        use = source.text(("routing", "router", "use"))
        if any(source.get(path) for path in old) and (use or any(source.get(path) for path in new)):
            raise source.wrong(
                ("routing",), "cannot have `groups` or `matrix` at the top, too: llama-swap takes one of both places"
            )
        if source.get(old[0]) and source.get(old[1]):
            raise source.wrong(old[1], "cannot have groups and a matrix: llama-swap takes one of both")
        if use not in ("", "group", "matrix"):
            raise source.wrong(("routing", "router", "use"), f"cannot use {use[:40]!r}: it must be group or matrix")
        if use == "matrix" and not source.get(new[1]):
            raise source.wrong(("routing", "router", "use"), "cannot use a matrix: there is none in settings")
        self._findings.usual(("routing", "router", "use"), "it shows in whether `together` has groups or sets")
        matrix = new[1] if use == "matrix" else old[1] if source.get(old[1]) else None
        groups = None if matrix else next((path for path in (old[0], new[0]) if source.get(path)), None)
        for path in (*old, *new):
            if path not in (groups, matrix):
                self._findings.usual(path, "the other one is in use" if source.get(path) else "it is empty")
        return groups, matrix

    def _groups(self, path: KeyPath | None) -> None:
        found: list[dict[str, Any]] = []
        grouped: dict[str, str] = {}
        for name in self._source.mapping(path) if path is not None else ():
            if group := self._group((*(path or ()), name), name, grouped, {one["id"] for one in found}):
                found.append(group)
        rest = [draft for model, draft in self._drafts.items() if model not in grouped and not draft.external]
        if len(rest) > 1 or (rest and found):
            group = {"id": _free("default", {one["id"] for one in found}), "pools": [draft.pool_id for draft in rest]}
            self._rules.notes["together", "groups", len(found)] = [_DEFAULT]
            self._findings.implied(
                "groups (default)", "together.groups", "models of no group swap; delete it to let memory decide"
            )
            found.append(group | {"exclusive": True} if found else group)
        if found:
            self._rules.section = {"groups": found}

    def _group(self, path: KeyPath, name: str, grouped: dict[str, str], ids: set[str]) -> dict[str, Any] | None:
        source = self._source
        pools: list[str] = []
        source.mapping(path)
        for index, model in enumerate(source.texts((*path, "members"))):
            at = (*path, "members", index)
            if model in grouped:
                raise source.wrong(at, f"cannot use {model[:80]!r} again: it is in group {grouped[model][:80]!r} already")
            grouped[model] = name
            draft = self._drafts.get(model)
            if draft is None:
                self._findings.dropped(at, "no pool was made of it" if model in self._names.ids else "there is no such model")
            elif draft.external:
                self._findings.dropped(at, _EXTERNAL)
            else:
                pools.append(draft.pool_id)
        if not pools:
            self._findings.dropped(path, "no pool of this file is in it")
            return None
        group: dict[str, Any] = {"id": _free(name[:63] if name.isprintable() and name else "group", ids), "pools": pools}
        for key, usual, ours in (("swap", True, True), ("exclusive", True, False), ("persistent", False, False)):
            value = source.truth((*path, key), usual)
            if value is not ours:
                group[key] = value
            self._findings.usual((*path, key), "it is the default here") if value is ours else self._findings.mapped(
                (*path, key), f"together.groups[].{key}"
            )
        self._findings.mapped((*path, "members"), "together.groups[].pools")
        return group

    def _matrix(self, path: KeyPath) -> None:
        source = self._source
        variables = {name: source.text((*path, "vars", name)) for name in source.mapping((*path, "vars"))}
        for name, model in variables.items():
            if model not in self._names.ids:
                raise source.wrong((*path, "vars", name), f"cannot use {model[:80]!r}: there is no such model")

        def resolve(name: str) -> str | None:
            found = variables.get(name, name)
            return found if found in self._names.ids else None

        expressions = {name: source.text((*path, "sets", name)) for name in source.mapping((*path, "sets"))}
        if not expressions:
            raise source.wrong(path, "cannot use a matrix without sets")
        self._costs(path, resolve)
        for name in variables:
            self._findings.mapped((*path, "vars", name), "together.sets", "its model stands where it was used")
        self._findings.usual((*path, "vars"), "it is empty")
        try:
            sets = expanded(expressions, resolve)
        except TooManyError as error:
            why = f"{error}: without them memory decides; write those that matter into together.sets"
            self._findings.dropped((*path, "sets"), why)
            return
        except ValueError as error:
            raise source.wrong((*path, "sets"), f"cannot read {error}") from None
        self._write(sets)
        for name in expressions:
            self._findings.mapped((*path, "sets", name), "together.sets", "written out")

    def _write(self, sets: Sequence[tuple[str, frozenset[str]]]) -> None:
        found: list[list[str]] = []
        last = ""
        for name, models in sets:
            pools = [draft.pool_id for model, draft in self._drafts.items() if model in models and not draft.external]
            if not pools or pools in found:
                continue
            if name != last:
                self._rules.notes["together", "sets", len(found)] = [name]
                last = name
            found.append(pools)
        if found:
            self._rules.section = {"sets": found}

    def _costs(self, path: KeyPath, resolve: Any) -> None:
        for name in self._source.mapping((*path, "evict_costs")):
            at = (*path, "evict_costs", name)
            cost, model = self._source.whole(at, 1), resolve(name)
            if cost < 1 or model is None:
                raise self._source.wrong(
                    at, "cannot use it: it must be 1 or more" if cost < 1 else "there is no such model or var"
                )
            if (draft := self._drafts.get(model)) is None or draft.external:
                self._findings.dropped(at, "no pool of this file makes room for it")
                continue
            self._rules.weights[draft.pool_id] = min(cost, MAX_WEIGHT)
            self._findings.mapped(at, "pools[].eviction_weight", "× the time that it takes to load")
        self._findings.usual((*path, "evict_costs"), "it is empty")


def _free(name: str, taken: set[str]) -> str:
    return next(found for found in chain([name], (f"{name[:58]}-{number}" for number in range(2, 2_000))) if found not in taken)
