"""One model of llama-swap as a pool of ours."""

from __future__ import annotations

import shlex
from urllib.parse import urlsplit

from pool_managerd.config.parse import KeyPath
from pool_managerd.core.redaction import masked_argv
from pool_managerd.moving import filters, settings
from pool_managerd.moving.cards import card
from pool_managerd.moving.command_line import Command, only_stops
from pool_managerd.moving.command_line import read as read_command
from pool_managerd.moving.draft import Draft, Surroundings
from pool_managerd.moving.engine_flags import MAX_CTX, FlagMover, Told, devices, shown
from pool_managerd.moving.macros import holds_secret, strings, without_marks
from pool_managerd.moving.names import Names, usable
from pool_managerd.moving.report import Findings
from pool_managerd.moving.source import Source

USUAL_LIMIT = 10
"""Requests that llama-swap lets in at once where ``concurrencyLimit`` does not say."""
_IN_ENVIRONMENT = (
    "it holds a secret of the environment: set it there, as POOL_MANAGERD__POOLS__{index}__PROVISIONING__ENV__{name}"
)


class ModelMover:
    """Writes pools. ``index`` is the place of the next one among them."""

    def __init__(self, source: Source, findings: Findings, names: Names, around: Surroundings) -> None:
        self._source, self._findings, self._names, self._around = source, findings, names, around
        self.index = 0

    def move(self, model: str) -> Draft | None:
        """The pool, or None for a model that nothing could be made of. Raises SpecError."""
        path: KeyPath = ("models", model)
        try:
            command = read_command(self._source.text((*path, "cmd")))
        except ValueError as error:
            raise self._source.wrong((*path, "cmd"), f"cannot read it: {error}") from None
        if command is None:
            self._findings.dropped(path, "it has no cmd: write a pool yourself, if it is one")
            return None
        draft = Draft(model, self._names.ids[model], {"id": self._names.ids[model], "provisioning": {}})
        if command.kind in ("container", "other"):
            if not self._external(draft, path, command):
                return None
        else:
            self._engine(draft, path, command)
        self._names_of(draft, path)
        settings.times(self._source, model, draft.fields, draft.external, self._findings)
        settings.rest(self._source, path, self._findings)
        rules = filters.rules(self._source, model, self._findings)
        if shown := card(self._source, model, self._findings):
            draft.fields["card"] = shown
        if rules:
            draft.fields["requests"] = {**draft.fields.get("requests", {}), **rules}
            self._note(draft, ("requests",), (*path, "filters"))
        if not draft.fields["provisioning"]:
            del draft.fields["provisioning"]
        self.index += 1
        return draft

    def _external(self, draft: Draft, path: KeyPath, command: Command) -> bool:
        """An engine that is attached to: nothing here starts containers or other programs yet."""
        url = self._source.text((*path, "proxy"), f"http://localhost:{self._source.ports.get(draft.model, '')}")
        if not _is_base_url(url) or holds_secret(url):
            self._findings.dropped(path, "it starts a program that is no engine of ours, and its proxy is no URL to attach to")
            return False
        draft.external = True
        slots = self._source.whole((*path, "concurrencyLimit"), 0) or USUAL_LIMIT
        draft.fields |= {"engine": command.engine, "model": draft.pool_id, "slots": slots}
        draft.fields["provisioning"] |= {"mode": "external", "url": url.rstrip("/")}
        what = "containers are not started yet" if command.kind == "container" else "it is no engine that is started here"
        self._findings.dropped((*path, "cmd"), f"{what}: start it yourself (a service of the system); here it is attached to")
        draft.notes[("provisioning",)] = ["start it yourself, as: " + _masked(shlex.join((command.program, *command.words)))]
        for key, why in (
            ("env", "whoever starts the program sets them"),
            ("cmdStop", "whoever starts the program stops it"),
        ):
            self._findings.lost((*path, key), why)
        if (*path, "proxy") in self._source.places:
            self._findings.mapped((*path, "proxy"), "pools[].provisioning.url")
        if (*path, "concurrencyLimit") in self._source.places:
            self._findings.mapped((*path, "concurrencyLimit"), "pools[].slots")
        self._health(draft, path)
        if name := self._source.text((*path, "useModelName")):
            if command.engine == "vllm" and usable(name):
                draft.fields["served_name"] = name
                self._findings.mapped((*path, "useModelName"), "pools[].served_name")
            else:
                self._findings.dropped((*path, "useModelName"), "requests reach this engine under the name that the client wrote")
        return True

    def _engine(self, draft: Draft, path: KeyPath, command: Command) -> None:
        visible, env = self._env(draft, path, command)
        draft.fields |= {"engine": command.engine}
        provisioning = draft.fields["provisioning"]
        provisioning |= {"mode": "binary", "binary": {"path": self._program(path, command.program)}}
        mover = FlagMover(
            command.engine, self._around.flags, visible, self._source.ports.get(draft.model), self._names.free_for(draft.model)
        )
        told = mover.move(command.words)
        self._findings.mapped((*path, "cmd"), "pools[].engine", f"{command.engine}, mode binary")
        for flag, outcome, to, why in told.entries:
            if outcome in ("mapped", "kept"):
                getattr(self._findings, outcome)((*path, "cmd"), to, why, part=shown(flag))
            else:
                getattr(self._findings, outcome)((*path, "cmd"), why, part=_masked(shown(flag)))
        draft.fields |= told.fields
        if mover.visible is not None:
            draft.fields["devices"] = mover.visible
        if "model" not in draft.fields:
            draft.fields["model"] = f"file:models/{draft.pool_id}.gguf"
            self._findings.dropped((*path, "cmd"), "it names no model: name its file in `model` of the pool", part="(no model)")
        self._slots(draft, path, told)
        self._served(draft, path, told)
        ports = told.ports[-1:]
        provisioning |= {key: value for key, value in (("ports", ports), ("env", env), ("flags", told.flags)) if value}
        self._note(draft, ("provisioning",), (*path, "cmd"))
        self._health(draft, path)
        self._proxy(path, ports)
        stop = self._source.text((*path, "cmdStop"))
        if not stop or only_stops(stop):
            self._findings.usual((*path, "cmdStop"), "a stop ends the engine and all it started, with SIGTERM and then SIGKILL")
        else:
            self._findings.dropped((*path, "cmdStop"), "nothing runs at a stop but SIGTERM and SIGKILL: clean up elsewhere")

    def _program(self, path: KeyPath, program: str) -> str:
        to = "pools[].provisioning.binary.path"
        if "/" in program:
            why = "" if program.startswith("/") else "relative to the configuration's folder"
            self._findings.mapped((*path, "cmd"), to, why, part=program)
            return program
        found = self._around.find(program)
        if found is None:
            self._findings.dropped(
                (*path, "cmd"), f"it is not in the PATH of this shell: write its whole path into {to}", part=program
            )
        else:
            self._findings.mapped((*path, "cmd"), to, part=program)
        return found or program

    def _env(self, draft: Draft, path: KeyPath, command: Command) -> tuple[list[int | str] | None, dict[str, str]]:
        """The devices that the command is shown, and the other variables."""
        at: KeyPath = (*path, "env")
        visible: list[int | str] | None = None
        env: dict[str, str] = {}
        for item in [*command.env, *self._source.texts(at)]:
            name, equals, value = item.partition("=")
            to = f"pools[].provisioning.env.{name}"
            if not equals or not name or not name.isprintable() or len(name) > 200 or "\0" in value:
                self._findings.dropped(at, "it is not NAME=VALUE", part=f"{name[:40]!r}")
            elif holds_secret(item):
                self._findings.dropped(at, _IN_ENVIRONMENT.format(index=self.index, name=name), part=name)
            elif name == "CUDA_VISIBLE_DEVICES":
                try:
                    visible = devices(value)
                    self._findings.mapped(at, "pools[].devices", "indices are in PCI order here", part=name)
                except ValueError as error:
                    self._findings.dropped(at, str(error), part=name)
            elif (why := settings.variable(command.engine, name, value)) is not None:
                outcome, text = why
                getattr(self._findings, outcome)(at, text, part=name)
            else:
                env[name] = value
                self._findings.kept(at, to, part=name)
        if at in self._source.places and not self._source.get(at):
            self._findings.needless(at, "it is empty")
        self._note(draft, ("provisioning", "env"), at)
        return visible, env

    def _slots(self, draft: Draft, path: KeyPath, told: Told) -> None:
        at: KeyPath = (*path, "concurrencyLimit")
        limit = self._source.whole(at, 0)
        fields = draft.fields
        if limit > 0 and fields.get("slots", limit) != limit:
            fields["requests"] = {"concurrency": limit}
            self._findings.mapped(at, "pools[].requests.concurrency", "those that wait for a slot are counted, too")
        elif "slots" in fields:
            self._findings.usual(at, "as many requests go in as there are slots; others wait, instead of being refused")
        elif limit > 0:
            fields["slots"] = limit
            shared = draft.fields["engine"] == "llamacpp" and limit > 1
            why = "with --kv-unified each may use the whole context" if shared else ""
            if shared and not {"-kvu", "--kv-unified", "-no-kvu", "--no-kv-unified"} & set(told.flags):
                told.flags.append("--kv-unified")
            self._findings.mapped(at, "pools[].slots", why)
        else:
            self._findings.usual(at, "it is the usual")
            if fields["engine"] == "vllm":
                fields["slots"] = USUAL_LIMIT
        if fields["engine"] == "vllm" and "ctx" in fields:
            draft.notes[("ctx",)] = [f"--max-model-len {fields['ctx']} × {fields['slots']} slots"]
            fields["ctx"] = min(MAX_CTX, fields["ctx"] * fields["slots"])
        if fields.get("slots") == 1:
            del fields["slots"]

    def _served(self, draft: Draft, path: KeyPath, told: Told) -> None:
        """The name that the engine itself goes by, unless another model is asked for by it."""
        at: KeyPath = (*path, "useModelName")
        is_free = self._names.free_for(draft.model)
        asked, names = self._source.text(at), [name for name in told.names if usable(name) and is_free(name)]
        if draft.fields["engine"] == "llamacpp":
            self._findings.usual(at, "llama-server answers under any name")
        elif asked:
            if usable(asked) and is_free(asked):
                names = [asked, *(name for name in names if name != asked)]
            self._findings.mapped(at, "pools[].served_name", "" if asked in names else "the engine goes by the pool's id here")
        if names:
            draft.fields |= {"served_name": names[0], "aliases": names[1:]}
        if draft.fields.get("served_name") == draft.pool_id:
            del draft.fields["served_name"]

    def _health(self, draft: Draft, path: KeyPath) -> None:
        at: KeyPath = (*path, "checkEndpoint")
        check = self._source.text(at, "/health")
        if check == "none":
            self._findings.needless(at, "ready without a probe would be a guess: /health is asked here")
        elif check in ("", "/health", "health"):
            self._findings.usual(at, "/health is asked here, too")
        elif not check.isprintable() or holds_secret(check):
            self._findings.dropped(at, "it is no path: /health is asked")
        else:
            draft.fields["health_path"] = "/" + check.lstrip("/")
            self._findings.mapped(at, "pools[].health_path")

    def _proxy(self, path: KeyPath, ports: list[int]) -> None:
        at: KeyPath = (*path, "proxy")
        url = self._source.text(at)
        try:
            parts = urlsplit(url)
            local, port = parts.hostname in ("localhost", "127.0.0.1", "::1"), parts.port
        except ValueError:
            local, port, parts = False, None, urlsplit("")
        if not url or (local and parts.path in ("", "/") and (port == self._source.ports.get(str(path[1])) or port in ports)):
            self._findings.usual(at, "the gateway knows where the engine listens")
        elif local and parts.path in ("", "/"):
            self._findings.needless(at, "the daemon gives the engine its port")
        else:
            self._findings.dropped(
                at, "engines are started on this machine and asked at /: for another one, write an external pool"
            )

    def _names_of(self, draft: Draft, path: KeyPath) -> None:
        at: KeyPath = (*path, "aliases")
        found: list[str] = draft.fields.pop("aliases", [])
        if draft.pool_id != draft.model and usable(draft.model):
            found = [draft.model, *found]
            self._findings.implied(f"models.{draft.model}", "pools[].aliases", f"its pool is {draft.pool_id!r}", path)
        elif draft.pool_id != draft.model:
            self._findings.dropped((*path, "id"), "a name has 1 to 256 printable characters here", part=f"{draft.model[:40]!r}")
        by_name = self._source.mapping((*path, "filters", "setParamsByID"))
        for index, alias in enumerate(self._source.texts(at)):
            if alias in by_name and usable(alias):
                self._findings.mapped((*at, index), "pools[].requests.by_name")
            elif alias in self._names.ids:
                self._findings.needless((*at, index), "it is the name of a model, which wins")
            elif not usable(alias) or holds_secret(alias):
                self._findings.dropped((*at, index), "a name has 1 to 256 printable characters here, and is no secret")
            else:
                found.append(alias)
        if found:
            draft.fields["aliases"] = list(dict.fromkeys(found))
        if at in self._source.places:
            self._findings.mapped(at, "pools[].aliases")
            self._note(draft, ("aliases",), at)

    def _note(self, draft: Draft, key: KeyPath, path: KeyPath) -> None:
        """The text as it was, where macros were in it."""
        was = [text for text in strings(self._source.get(path, original=True)) if _has_macros(text)]
        if was:
            lines = [f"{path[-1]}: {_masked(text.strip())}" for text in was[:10]]
            draft.notes[key] = [*draft.notes.get(key, []), *lines]


def _has_macros(text: str) -> bool:
    return "${" in text.replace("${PORT}", "").replace("${PID}", "")


def _masked(text: str) -> str:
    """``text`` without its secrets, line by line as it was."""
    lines = without_marks(text).splitlines()
    shown = iter(masked_argv([word for line in lines for word in line.split(" ")]))
    return "\n".join(" ".join(next(shown) for _ in line.split(" ")) for line in lines)


def _is_base_url(url: str) -> bool:
    """Whether an external pool may have it."""
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        return False
    whole = not (parts.query or parts.fragment or parts.username or parts.password)
    return parts.scheme in ("http", "https") and bool(parts.hostname) and whole and url.isprintable() and not url.endswith(":")
