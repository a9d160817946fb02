"""One section of presets as a pool of ours."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from pool_managerd.config.parse import KeyPath
from pool_managerd.moving.draft import Draft, Surroundings
from pool_managerd.moving.engine_flags import FlagMover
from pool_managerd.moving.fates import Fates
from pool_managerd.moving.names import Names, usable
from pool_managerd.moving.preset_keys import TRUE, Key, words
from pool_managerd.moving.report import Findings, Outcome
from pool_managerd.moving.settings import MAX_TTL_MS, idle_ttl_ms

PROGRAM = "llama-server"
USUAL_STOP_S = 10
"""How long the router lets a model end where nothing says it."""
_COMMAND_LINE = "the router takes it from its own command line alone"
_NEEDLESS = {
    "--host": "the router sets it itself, as the daemon does", "--port": "the router sets it itself, as the daemon does",
    "--api-key": f"{_COMMAND_LINE}, and keys are the gateway's: `pool-managerd keys add NAME` makes one",
    "--ssl-key-file": f"{_COMMAND_LINE}; here it is gateway.tls_key",
    "--ssl-cert-file": f"{_COMMAND_LINE}; here it is gateway.tls_cert",
    "--models-dir": _COMMAND_LINE, "--models-preset": _COMMAND_LINE, "--models-autoload": f"{_COMMAND_LINE}; see `preload`",
    "--models-max": f"{_COMMAND_LINE}; here memory decides how many are loaded",
    "dedup-cache-models": "there is no cache of models here",
}  # fmt: skip


def aliases(keys: Mapping[str, Key]) -> list[str]:
    """The further names of a model, in the order in which they are written."""
    key = keys.get("--alias")
    return list(dict.fromkeys(filter(None, (part.strip() for part in key.entry.value.split(","))))) if key is not None else []


class SectionMover:
    """Writes pools. ``stops`` is how many seconds each model has to end; what became of keys goes into ``fates``."""

    def __init__(self, findings: Findings, fates: Fates, names: Names, around: Surroundings) -> None:
        self._findings, self._fates, self._names, self._around = findings, fates, names, around
        self._program = around.find(PROGRAM) or PROGRAM
        self.stops: list[int] = []

    def move(self, model: str, keys: list[Key]) -> Draft:
        provisioning = {"mode": "binary", "binary": {"path": self._program}}
        draft = Draft(model, self._names.ids[model], {"id": self._names.ids[model], "engine": "llamacpp", "preload": False})
        draft.fields["provisioning"] = provisioning
        self.stops.append(USUAL_STOP_S)
        command: list[str] = []
        written_as: dict[str, KeyPath] = {}
        for key in keys:
            if key.option in _NEEDLESS:
                self._fates.needless(key.entry.path, model, _NEEDLESS[key.option])
            elif (move := self._MOVES.get(key.option)) is not None:
                move(self, draft, key)
            elif found := self._words(model, key):
                command += found
                written_as[found[0]] = key.entry.path
        self._engine(draft, tuple(command), written_as)
        self._names_of(draft)
        return draft

    def _words(self, model: str, key: Key) -> tuple[str, ...]:
        try:
            found = words(key)
        except ValueError as error:
            self._fates.dropped(key.entry.path, model, str(error))
            return ()
        if not found:
            self._fates.needless(key.entry.path, model, "it is so without it")
        return found

    def _engine(self, draft: Draft, command: tuple[str, ...], written_as: Mapping[str, KeyPath]) -> None:
        model, fields = draft.model, draft.fields
        mover = FlagMover("llamacpp", self._around.flags, None, None, self._names.free_for(model))
        told = mover.move(command)
        for flag, outcome, to, why in told.entries:
            self._fates.add(written_as[flag.items[0]], model, Outcome(outcome), to, why)
        fields |= told.fields
        if mover.visible is not None:
            fields["devices"] = mover.visible
        if told.flags:
            fields["provisioning"]["flags"] = told.flags
        if fields.get("slots") == 1:
            del fields["slots"]
        if "model" not in fields:
            fields["model"] = f"file:models/{draft.pool_id}.gguf"
            why = "it names no model, and the router's cache and --models-dir are not looked into: name the file in `model`"
            self._findings.dropped(("models", model), why, part="(no model)")

    def _names_of(self, draft: Draft) -> None:
        """A pool whose id cannot be the section's name answers to that all the same, and calls itself so."""
        name, path = draft.model, ("models", draft.model)
        if draft.pool_id == name:
            return
        if not usable(name):
            self._findings.dropped(path, "a name has 1 to 256 printable characters here", part="(name)")
        elif "," in name:  # llama-server takes it for several
            draft.fields["aliases"] = [name, *draft.fields.get("aliases", [])]
            self._findings.mapped(path, "pools[].aliases", f"its pool is {draft.pool_id!r}", part="(name)")
        else:
            draft.fields["served_name"] = name
            self._findings.mapped(path, "pools[].served_name", f"its pool is {draft.pool_id!r}", part="(name)")

    def _move_alias(self, draft: Draft, key: Key) -> None:
        found = [name for name in aliases({key.option: key}) if name not in (draft.model, draft.pool_id)]
        if unusable := [name for name in found if not usable(name)]:
            named = ", ".join(repr(name[:40]) for name in unusable[:3])
            self._fates.dropped(key.entry.path, draft.model, f"a name has 1 to 256 printable characters here: {named} has not")
            found = [name for name in found if usable(name)]
        else:
            self._fates.mapped(key.entry.path, draft.model, "pools[].aliases")
        if found:
            draft.fields["aliases"] = found

    def _move_tags(self, draft: Draft, key: Key) -> None:
        tags = list(filter(None, (part.strip() for part in key.entry.value.split(","))))
        if not tags:
            self._fates.needless(key.entry.path, draft.model, "it says nothing")
            return
        draft.fields["card"] = {"metadata": {"tags": tags}}
        self._fates.add(key.entry.path, draft.model, Outcome.KEPT, "pools[].card.metadata.tags", "")

    def _move_preload(self, draft: Draft, key: Key) -> None:
        draft.fields["preload"] = key.entry.value in TRUE
        self._fates.mapped(key.entry.path, draft.model, "pools[].preload")

    def _move_stop(self, draft: Draft, key: Key) -> None:
        seconds = _whole(key.entry.value)
        if seconds is None or seconds < 0:
            why = f"it is no number of seconds: the router goes by {USUAL_STOP_S}"
            self._fates.needless(key.entry.path, draft.model, why)
            return
        self.stops[-1] = seconds
        self._fates.mapped(key.entry.path, draft.model, "supervision.stop_grace_ms", "one for all pools: the longest")

    def _move_idle(self, draft: Draft, key: Key) -> None:
        seconds = _whole(key.entry.value)
        if seconds is None:
            self._fates.dropped(key.entry.path, draft.model, "it is no number of seconds: set `idle_ttl_ms` of the pool")
        elif seconds <= 0:
            self._fates.needless(key.entry.path, draft.model, "never is the default here, too")
        else:
            draft.fields["idle_ttl_ms"] = idle_ttl_ms(seconds)
            why = "30 days are the most" if seconds * 1_000 > MAX_TTL_MS else "the engine ends, and starts when it is asked again"
            self._fates.mapped(key.entry.path, draft.model, "pools[].idle_ttl_ms", why)

    _MOVES: Mapping[str, Callable[[SectionMover, Draft, Key], None]] = {
        "--alias": _move_alias, "--tags": _move_tags, "load-on-startup": _move_preload, "stop-timeout": _move_stop,
        "--sleep-idle-seconds": _move_idle,
    }  # fmt: skip


def _whole(text: str) -> int | None:
    return int(text) if re.fullmatch(r"-?\d{1,9}", text) else None
