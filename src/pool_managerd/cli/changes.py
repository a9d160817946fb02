"""Commands that change pools: they wait for the outcome and show how far it is."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from pool_managerd.cli import output as shown
from pool_managerd.cli.client import Daemon
from pool_managerd.cli.exits import NO, UNREACHABLE, USAGE, CommandFailed
from pool_managerd.cli.options import All, ConfigFile, Output, PoolId, PoolIds, Url, chosen, daemon
from pool_managerd.cli.output import Format, Json, show
from pool_managerd.cli.progress import sentence, wait_for
from pool_managerd.cli.table import facts

NoWait = Annotated[bool, typer.Option("--no-wait", help="Do not wait; `operations ID` tells how it ended.")]
Prepared = Annotated[
    Path | None,
    typer.Option("--file", "-f", help="JSON of a PreparedEngine to run instead of the configured one; - reads stdin."),
]
Deadline = Annotated[
    int | None, typer.Option("--deadline-ms", min=0, max=86_400_000, help="How long leases may take to end.", show_default=False)
]
_UP = ("start", "restart", "preload")
# What a refused change asked for, and whether it is so already: then there is nothing to refuse.
_ALREADY: dict[str, Callable[[Json], bool]] = {
    "preload": lambda pool: bool(pool.get("ready")),
    "undrain": lambda pool: not pool.get("draining") and not pool.get("drained"),
}


def start(
    ids: PoolIds = None, every: All = False, no_wait: NoWait = False, url: Url = None, config: ConfigFile = None,
    output: Output = Format.TABLE,
) -> None:  # fmt: skip
    """Start engines and wait until they are ready."""
    _change(daemon(url, config), ids, every, "start", no_wait, output)


def stop(
    ids: PoolIds = None, every: All = False, no_wait: NoWait = False, url: Url = None, config: ConfigFile = None,
    output: Output = Format.TABLE,
) -> None:  # fmt: skip
    """Stop engines at once; they stay down.

    Leases are not waited for; `drain` does that.
    """
    _change(daemon(url, config), ids, every, "stop", no_wait, output)


def evict(
    ids: PoolIds = None, every: All = False, no_wait: NoWait = False, url: Url = None, config: ConfigFile = None,
    output: Output = Format.TABLE,
) -> None:  # fmt: skip
    """Stop idle engines; whoever needs one starts it again.

    Refused while requests are in flight.
    """
    _change(daemon(url, config), ids, every, "evict", no_wait, output)


def restart(
    ids: PoolIds = None, every: All = False, no_wait: NoWait = False, url: Url = None, config: ConfigFile = None,
    output: Output = Format.TABLE,
) -> None:  # fmt: skip
    """Stop and start engines."""
    _change(daemon(url, config), ids, every, "restart", no_wait, output)


def preload(
    ids: PoolIds = None, every: All = False, file: Prepared = None, no_wait: NoWait = False, url: Url = None,
    config: ConfigFile = None, output: Output = Format.TABLE,
) -> None:  # fmt: skip
    """Bring pools up, or run an engine described in a file."""
    body = None if file is None else read_prepared(file)
    if body is not None and (every or not ids or len(ids) != 1):
        raise CommandFailed("cannot use --file for anything but one pool", USAGE, hint="give one ID")
    _change(daemon(url, config), ids, every, "preload", no_wait, output, body=body, query={"wait": False})


def drain(
    ids: PoolIds = None, every: All = False, deadline_ms: Deadline = None, no_wait: NoWait = False, url: Url = None,
    config: ConfigFile = None, output: Output = Format.TABLE,
) -> None:  # fmt: skip
    """Take no new leases, wait for the given ones, then stop.

    At the deadline the engine is stopped all the same. A drained pool stays down until it is started.
    """
    body = None if deadline_ms is None else {"deadline_ms": deadline_ms}
    _change(daemon(url, config), ids, every, "drain", no_wait, output, body=body)


def undrain(
    ids: PoolIds = None, every: All = False, url: Url = None, config: ConfigFile = None, output: Output = Format.TABLE
) -> None:
    """Call running drains off."""
    _change(daemon(url, config), ids, every, "undrain", False, output)


def hold(
    ids: PoolIds = None, every: All = False, url: Url = None, config: ConfigFile = None, output: Output = Format.TABLE
) -> None:
    """Let nothing start pools until they are released."""
    _change(daemon(url, config), ids, every, "hold", False, output)


def release(
    ids: PoolIds = None, every: All = False, url: Url = None, config: ConfigFile = None, output: Output = Format.TABLE
) -> None:
    """End holds."""
    _change(daemon(url, config), ids, every, "release", False, output)


def breaker_reset(pool_id: PoolId, url: Url = None, config: ConfigFile = None, output: Output = Format.TABLE) -> None:
    """Close a pool's circuit breaker."""
    _change(daemon(url, config), [pool_id], False, "circuit/reset", False, output)


def rm(ids: PoolIds = None, url: Url = None, config: ConfigFile = None, output: Output = Format.TABLE) -> None:
    """Forget pools that are down and not configured."""
    node = daemon(url, config)
    work = _Work(chosen(node, ids, False))
    for pool_id in work.ids:
        if (answer := work.attempt(pool_id, partial(node.request, "DELETE", "pools", pool_id))) is not None:
            work.done[pool_id] = answer
    work.show(output, lambda answer: sys.stdout.write(f"pool {answer.get('pool_id')} is forgotten\n"))


class _Work:
    """One change of several pools: each goes its way, and the worst end is the command's."""

    def __init__(self, ids: list[str]) -> None:
        self.ids = ids
        self.done: dict[str, Json] = {}
        self.failures: dict[str, CommandFailed] = {}

    def attempt(self, pool_id: str, call: Callable[[], Json]) -> Json | None:
        """The answer; None when it was refused, which is kept. That the daemon is not there ends everything."""
        try:
            return call()
        except CommandFailed as failure:
            if len(self.ids) == 1 or failure.exit_code == UNREACHABLE:
                raise
            self.failures[pool_id] = failure
            return None

    def show(self, output: Format, lines: Callable[[Json], Any]) -> None:
        """All outcomes (JSON: one object for one pool, else a list), then what failed. Raises the worst failure."""
        answers = [self.done[pool_id] for pool_id in self.ids if pool_id in self.done]
        if output is Format.JSON:
            show(answers[0] if len(self.ids) == 1 else answers, output, lines)
        else:
            for answer in answers:
                if answer.get("status") != "failed":
                    lines(answer)
        if not self.ids:
            sys.stderr.write("there are no pools\n")
        self._note_failures(answers)
        if self.failures:
            self._raise()

    def _note_failures(self, answers: list[Json]) -> None:
        for answer in answers:
            failure = answer.get("error")
            if answer.get("status") == "failed" and isinstance(failure, dict):
                self.failures[answer["pool_id"]] = CommandFailed(
                    str(failure.get("message")), NO, hint=failure.get("hint"), code=failure.get("code")
                )

    def _raise(self) -> None:
        for pool_id, failure in self.failures.items():
            if len(self.ids) > 1 and pool_id not in failure.message:
                failure.message = f"pool {pool_id}: {failure.message}"
        *others, last = sorted(self.failures.values(), key=lambda failure: failure.exit_code)
        for failure in others:
            shown.error(failure.message, failure.hint)
        raise last


def change_one(node: Daemon, pool_id: str, kind: str, no_wait: bool, output: Format, body: Json) -> None:
    """Ask for one change of one pool, wait for its end unless ``no_wait``, and show it. Raises CommandFailed."""
    _change(node, [pool_id], False, kind, no_wait, output, body=body)


def _change(
    node: Daemon, ids: list[str] | None, every: bool, kind: str, no_wait: bool, output: Format, *,
    body: Json | None = None, query: Json | None = None,
) -> None:  # fmt: skip
    work = _Work(chosen(node, ids, every))
    for pool_id in work.ids:
        answer = work.attempt(pool_id, partial(_asked, node, pool_id, kind, body, query))
        if answer is not None:
            work.done[pool_id] = answer
    if not no_wait:
        try:
            _wait(node, work.done)
        except KeyboardInterrupt:
            names = " ".join(work.ids)
            hint = f"pool-managerd status {names}"
            raise CommandFailed(f"the {_word(kind)} of {names} goes on in the daemon", 130, hint=hint) from None
    for pool_id, operation in work.done.items():
        if kind in _UP and operation.get("status") == "succeeded":
            operation["outcome"] = {**(operation.get("outcome") or {}), "url": _url(node, pool_id)}
    work.show(output, _outcome)


def _asked(node: Daemon, pool_id: str, kind: str, body: Json | None, query: Json | None) -> Json:
    """The accepted operation. What is so already is a success, and a preload joins the start that is under way."""
    try:
        answer: Json = node.request("POST", "pools", pool_id, *kind.split("/"), body=body, query=query)
    except CommandFailed as refusal:
        if body is not None or kind not in _ALREADY or refusal.code not in _REFUSALS:
            raise
        pool: Json = node.get("pools", pool_id, "status")
        if _ALREADY[kind](pool):
            outcome = {"pool_id": pool_id, "pid": pool.get("pid")} if kind == "preload" else {"pool_id": pool_id}
            return {"operation_id": None, "kind": kind, "pool_id": pool_id, "status": "succeeded", "outcome": outcome}
        if kind != "preload" or refusal.code != "OPERATION_IN_PROGRESS" or not pool.get("preload"):
            raise
        answer = node.request("POST", "pools", pool_id, "start")
    return answer


# What is said of a success that had nothing to do.
_UNCHANGED = {
    "reload": "nothing was to change: it runs that already", "stop": "nothing was to stop: it was down, and stays so",
    "evict": "nothing was to stop: it was down",
}  # fmt: skip
_REFUSALS = ("ALREADY_READY", "OPERATION_IN_PROGRESS", "INVALID_PARAMS")


def _wait(node: Daemon, running: dict[str, Json]) -> None:
    """Until none of the operations runs any more; they are replaced by what became of them."""

    def pending() -> list[str]:
        for pool_id, operation in running.items():
            if operation.get("status") == "running":
                running[pool_id] = node.get("operations", operation["operation_id"])
        left = [pool_id for pool_id, operation in running.items() if operation.get("status") == "running"]
        return [sentence(node.get("pools", pool_id, "status")) for pool_id in left]

    wait_for(pending)


def _url(node: Daemon, pool_id: str) -> str | None:
    try:
        found: str | None = node.get("pools", pool_id, "status").get("url")
    except CommandFailed:  # it has ended again since
        return None
    return found


def _word(kind: str) -> str:
    return {"circuit/reset": "reset of the circuit breaker", "reset_breaker": "reset of the circuit breaker"}.get(kind, kind)


def _outcome(operation: Json) -> None:
    kind, outcome = str(operation.get("kind")), operation.get("outcome") or {}
    unchanged = f"; {_UNCHANGED.get(kind, 'nothing was to change')}" if outcome.get("unchanged") else ""
    sys.stdout.write(f"{_word(kind)} of pool {operation.get('pool_id')}: {operation.get('status')}{unchanged}\n")
    if unchanged:
        return
    told = {name: outcome.get(name) for name in ("url", "pid")} if "url" in outcome else outcome
    facts((name.replace("_", " "), value) for name, value in told.items() if name != "pool_id")
    if operation.get("status") == "running":
        sys.stdout.write(f"operation {operation.get('operation_id')}\n")


def read_prepared(file: Path) -> Json:
    """What is in the file. Raises CommandFailed."""
    try:
        body = json.loads(sys.stdin.read(1 << 20) if str(file) == "-" else file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        raise CommandFailed(f"cannot read a PreparedEngine from {file}: {problem}", USAGE) from problem
    if not isinstance(body, dict):
        raise CommandFailed(f"cannot use {file}: it must hold one JSON object", USAGE)
    return body
