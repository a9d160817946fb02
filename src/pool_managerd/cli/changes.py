"""Commands that change a pool: they wait for the outcome and show how far it is."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Protocol

import typer

from pool_managerd.cli.client import Daemon
from pool_managerd.cli.exits import NO, USAGE, CommandFailed
from pool_managerd.cli.options import ConfigFile, Output, PoolId, Url, daemon
from pool_managerd.cli.output import Format, facts, printable, show

_POLL_S = 0.15
NoWait = Annotated[bool, typer.Option("--no-wait", help="Do not wait for the outcome.")]
Prepared = Annotated[
    Path | None,
    typer.Option("--file", "-f", help="JSON of a PreparedEngine to run instead of the configured one; - reads stdin."),
]
Deadline = Annotated[
    int | None, typer.Option("--deadline-ms", min=0, max=86_400_000, help="How long leases may take to end.", show_default=False)
]


class Progress(Protocol):
    """Shows one sentence that changes."""

    def update(self, sentence: str) -> None: ...


def start(
    pool_id: PoolId, no_wait: NoWait = False, url: Url = None, config: ConfigFile = None, output: Output = Format.TABLE
) -> None:
    """Start a pool's engine and wait until it is ready."""
    _change(daemon(url, config), pool_id, "start", no_wait, output)


def stop(
    pool_id: PoolId, no_wait: NoWait = False, url: Url = None, config: ConfigFile = None, output: Output = Format.TABLE
) -> None:
    """Stop a pool's engine without waiting for leases; it stays down."""
    _change(daemon(url, config), pool_id, "stop", no_wait, output)


def restart(
    pool_id: PoolId, no_wait: NoWait = False, url: Url = None, config: ConfigFile = None, output: Output = Format.TABLE
) -> None:
    """Stop and start a pool's engine."""
    _change(daemon(url, config), pool_id, "restart", no_wait, output)


def preload(
    pool_id: PoolId,
    file: Prepared = None,
    no_wait: NoWait = False,
    url: Url = None,
    config: ConfigFile = None,
    output: Output = Format.TABLE,
) -> None:
    """Bring a pool up: the configured engine, or the one described in a file."""
    body = None if file is None else _read_prepared(file)
    _change(daemon(url, config), pool_id, "preload", no_wait, output, body=body, query={"wait": False})


def drain(
    pool_id: PoolId,
    deadline_ms: Deadline = None,
    no_wait: NoWait = False,
    url: Url = None,
    config: ConfigFile = None,
    output: Output = Format.TABLE,
) -> None:
    """Take no new leases, wait for the given ones until the deadline, then stop the engine."""
    body = None if deadline_ms is None else {"deadline_ms": deadline_ms}
    _change(daemon(url, config), pool_id, "drain", no_wait, output, body=body)


def undrain(pool_id: PoolId, url: Url = None, config: ConfigFile = None, output: Output = Format.TABLE) -> None:
    """Call a running drain off."""
    _change(daemon(url, config), pool_id, "undrain", False, output)


def hold(pool_id: PoolId, url: Url = None, config: ConfigFile = None, output: Output = Format.TABLE) -> None:
    """Let nothing start the pool by itself until it is released."""
    _change(daemon(url, config), pool_id, "hold", False, output)


def release(pool_id: PoolId, url: Url = None, config: ConfigFile = None, output: Output = Format.TABLE) -> None:
    """End a hold."""
    _change(daemon(url, config), pool_id, "release", False, output)


def breaker_reset(pool_id: PoolId, url: Url = None, config: ConfigFile = None, output: Output = Format.TABLE) -> None:
    """Close a pool's circuit breaker."""
    _change(daemon(url, config), pool_id, "circuit/reset", False, output)


def _change(
    node: Daemon,
    pool_id: str,
    kind: str,
    no_wait: bool,
    output: Format,
    *,
    body: dict[str, Any] | None = None,
    query: dict[str, Any] | None = None,
) -> None:
    operation: dict[str, Any] = node.request("POST", "pools", pool_id, *kind.split("/"), body=body, query=query)
    if not no_wait:
        try:
            operation = _wait(node, operation, pool_id)
        except KeyboardInterrupt:
            raise CommandFailed(
                f"the {kind} of pool {pool_id} goes on in the daemon", 130, hint=f"pool-managerd status {pool_id}"
            ) from None
    failure = operation.get("error")
    if operation.get("status") == "failed" and isinstance(failure, dict):
        show(operation, output, lambda _: None)
        raise CommandFailed(str(failure.get("message")), NO, hint=failure.get("hint"), code=failure.get("code"))
    show(operation, output, _outcome)


def _wait(node: Daemon, operation: dict[str, Any], pool_id: str) -> dict[str, Any]:
    with _progress() as progress:
        while operation.get("status") == "running":
            time.sleep(_POLL_S)
            operation = node.get("operations", operation["operation_id"])
            if operation.get("status") == "running":
                progress.update(_sentence(node.get("pools", pool_id, "status")))
    return operation


def _sentence(pool: dict[str, Any]) -> str:
    step = pool.get("preload") or {}
    done, total = step.get("bytes_done"), step.get("bytes_total")
    percent = f" ({100 * done // total} %)" if done and total else ""
    leases = f", {pool['active_leases']} leases" if pool.get("draining") else ""
    return f"{pool['pool_id']}: {step.get('human') or pool['state']}{percent}{leases}"


class _Lines:
    """Without a terminal: each new sentence is a line on stderr."""

    def __init__(self) -> None:
        self._last = ""

    def update(self, sentence: str) -> None:
        if sentence != self._last:
            self._last = sentence
            sys.stderr.write(printable(sentence) + "\n")


@contextmanager
def _progress() -> Iterator[Progress]:
    if not sys.stderr.isatty():
        yield _Lines()
        return
    from rich.console import Console
    from rich.markup import escape

    with Console(stderr=True).status("…") as spinner:

        class Spinner:
            def update(self, sentence: str) -> None:
                spinner.update(escape(printable(sentence)))

        yield Spinner()


def _outcome(operation: dict[str, Any]) -> None:
    sys.stdout.write(f"{operation.get('kind')} of pool {operation.get('pool_id')}: {operation.get('status')}\n")
    facts((name, value) for name, value in (operation.get("outcome") or {}).items() if name != "pool_id")
    if operation.get("status") == "running":
        sys.stdout.write(f"operation {operation.get('operation_id')}\n")


def _read_prepared(file: Path) -> dict[str, Any]:
    try:
        body = json.loads(sys.stdin.read(1 << 20) if str(file) == "-" else file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        raise CommandFailed(f"cannot read a PreparedEngine from {file}: {problem}", USAGE) from problem
    if not isinstance(body, dict):
        raise CommandFailed(f"cannot use {file}: it must hold one JSON object", USAGE)
    return body
