"""A small client of the control API on the standard library alone, so that commands start fast."""

from __future__ import annotations

import difflib
import http.client
import json
import ssl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

from pool_managerd.cli import address
from pool_managerd.cli.exits import NO, REFUSED, UNREACHABLE, USAGE, CommandFailed
from pool_managerd.errors import SpecError

DEFAULT_URL = "http://127.0.0.1:9200"
DEFAULT_CONFIG = Path("pool-managerd.yaml")
DEFAULT_STATE_DIR = Path(".state")
_MAX_BODY_BYTES = 64 * 1024 * 1024
_MOST_LISTED = 20
# Where what is there is listed, by the error that says that something is not: the route, the key of its rows, the words.
_LISTS = {
    "POOL_NOT_FOUND": ("pools", "pool_id", "pools"),
    "DEVICE_NOT_FOUND": ("devices", "device", "devices"),
    "OPERATION_NOT_FOUND": ("operations", "operation_id", "newest operations"),
}
_FAILED_CODES = frozenset({"PRELOAD_FAILED", "DIGEST_MISMATCH", "DRAIN_TIMEOUT"})


@dataclass(frozen=True, slots=True)
class Daemon:
    """Where the daemon answers, and the token for it. ``state_dir`` may hold its local token. After ``timeout_s``, or of a stream
    ``silence_s``, without a byte it counts as gone.
    """

    url: str
    token: str | None = field(default=None, repr=False)
    timeout_s: float = 30.0
    state_dir: Path = DEFAULT_STATE_DIR
    silence_s: float = 90.0

    def get(self, *path: str, **query: str | int | bool) -> Any:
        """The decoded answer. Raises CommandFailed: unreachable (3) or refused (4)."""
        return self.request("GET", *path, query=query)

    def request(self, method: str, *path: str, body: Any = None, query: Mapping[str, str | int | bool] | None = None) -> Any:
        """One call. ``path`` are the segments behind /v1; they are quoted here."""
        with self._answer(method, path, body, query) as response:
            raw = response.read(_MAX_BODY_BYTES)
            value = _decode(raw)
            if response.status < 400 or (response.status == 503 and isinstance(value, dict) and "ready" in value):
                return value
        raise self._not_found(refused(value, response.status), path)

    @contextmanager
    def stream(self, *path: str, sse: bool = False, **query: str | int | bool) -> Iterator[Iterator[bytes]]:
        """The chunks of an endless answer as they come. ``sse``: as server-sent events, also where it can be had otherwise."""
        accept = "text/event-stream" if sse else "*/*"
        with self._answer("GET", path, None, query, timeout_s=self.silence_s, accept=accept) as response:
            if response.status < 400:
                yield _chunks(response)
                return
            value = _decode(response.read(_MAX_BODY_BYTES))
        raise self._not_found(refused(value, response.status), path)

    def _not_found(self, failure: CommandFailed, path: tuple[str, ...]) -> CommandFailed:
        """Where an ID is not known, which ones are, and the one that was probably meant."""
        if failure.code not in _LISTS or len(path) < 2:
            return failure
        listed, key, what = _LISTS[failure.code]
        try:
            rows = self.get(listed)
            ids = [str(row[key]) for row in (rows["devices"] if listed == "devices" else rows)][-_MOST_LISTED:]
        except (CommandFailed, KeyError, TypeError):
            return failure
        near = difflib.get_close_matches(path[1], ids, 1, 0.6)
        known = f"the {what} are: {', '.join(ids)}" if ids else f"there are no {what}"
        failure.hint = f"did you mean {near[0]}? {known}" if near else known
        return failure

    @contextmanager
    def _answer(
        self,
        method: str,
        path: tuple[str, ...],
        body: Any,
        query: Mapping[str, Any] | None,
        timeout_s: float | None = None,
        accept: str = "*/*",
    ) -> Iterator[http.client.HTTPResponse]:
        if not all(segment.strip() for segment in path):
            raise CommandFailed("cannot use an empty ID", USAGE, hint="pool-managerd pools, devices and operations list them")
        parts = urlsplit(self.url)
        connection = _connection(parts.scheme, parts.netloc, timeout_s or self.timeout_s)
        target = parts.path.rstrip("/") + "/v1/" + "/".join(quote(segment, safe="") for segment in path)
        if query:
            target += "?" + urlencode(
                {key: str(value).lower() if isinstance(value, bool) else value for key, value in query.items()}
            )
        headers = {"Accept": accept}
        if self.token is not None:
            headers["Authorization"] = f"Bearer {self.token}"
        if body is not None:
            headers["Content-Type"] = "application/json"
        try:
            content = None if body is None else json.dumps(body)
            connection.request(method, target, content, headers)
            response = connection.getresponse()
            if response.status == 401 and self.token is None and (token := self._local_token(connection, parts.hostname)):
                response.close()
                connection.close()
                connection.request(method, target, content, headers | {"Authorization": f"Bearer {token}"})
                response = connection.getresponse()
            yield response
        except (OSError, http.client.HTTPException) as error:
            raise CommandFailed(
                f"cannot reach the daemon at {self.url}: {str(error) or type(error).__name__}",
                UNREACHABLE,
                hint="start it with: pool-managerd serve --config FILE; or say where it is with --url or POOL_MANAGERD_URL",
            ) from error
        finally:
            connection.close()

    def _local_token(self, connection: http.client.HTTPConnection, host: str | None) -> str | None:
        """The token that the daemon left for its own user, unless somebody else than that user answers there."""
        from pool_managerd.httpd.peers import LOCAL_TOKEN, can_tell, is_loopback, uid_of_peer

        path = self.state_dir / LOCAL_TOKEN
        if host is None or not is_loopback(host) or connection.sock is None:
            return None
        with suppress(OSError):
            if uid_of_peer(connection.sock) == path.stat().st_uid or not can_tell(connection.sock):
                return _first_line(path, optional=True)
        return None


def find_daemon(url: str | None, config: Path | None, env: Mapping[str, str]) -> Daemon:
    """The daemon meant by ``--url``, POOL_MANAGERD_URL, the configuration's bind, or the default address, in this order."""
    token = _token(env)
    if chosen := (url or env.get("POOL_MANAGERD_URL")):
        parts = urlsplit(chosen)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise CommandFailed(f"cannot use {chosen!r} as the daemon's URL", USAGE, hint=f"write it as {DEFAULT_URL}")
        return Daemon(chosen, token)
    path = config or (DEFAULT_CONFIG if DEFAULT_CONFIG.is_file() else None)
    if path is None and not env.get("POOL_MANAGERD_ADDR") and not env.get("POOL_MANAGERD__DAEMON__BIND"):
        return Daemon(DEFAULT_URL, token)
    try:
        found = address.of_config(path, env)
    except SpecError as problem:
        if path is not None and not path.exists():
            problem.hint = "say where the daemon is: --url"
        raise
    if token is None and found.token_file is not None:
        token = _first_line(found.token_file, optional=True)
    return Daemon(found.url, token, state_dir=found.state_dir)


def refused(value: Any, status: int) -> CommandFailed:
    """The daemon's error envelope as the error of a command: 1 when the work itself failed, else 4."""
    body = value if isinstance(value, dict) else {}
    code = body.get("code")
    message = str(body.get("message") or f"cannot do it: the daemon answered {status}")
    exit_code = NO if code in _FAILED_CODES else REFUSED
    hint = body.get("hint")
    if status == 401:
        hint = f"give the token with POOL_MANAGERD_TOKEN_FILE or AUTH_TOKEN; the daemon says: {hint}"
    return CommandFailed(message, exit_code, hint=hint, code=code, retriable=body.get("retriable") is True)


def _token(env: Mapping[str, str]) -> str | None:
    if file := env.get("POOL_MANAGERD_TOKEN_FILE"):
        return _first_line(Path(file), optional=False)
    return env.get("AUTH_TOKEN", "").strip() or None


def _first_line(path: Path, *, optional: bool) -> str | None:
    try:
        with path.open("rb") as file:
            return file.read(4096).partition(b"\n")[0].strip().decode("ascii", "replace") or None
    except OSError as error:
        if optional:
            return None
        raise CommandFailed(
            f"cannot read the token from {path}: {error.strerror}", USAGE, hint="see POOL_MANAGERD_TOKEN_FILE"
        ) from error


def _connection(scheme: str, netloc: str, timeout_s: float) -> http.client.HTTPConnection:
    host = netloc.rpartition("@")[2]
    if scheme == "https":
        return http.client.HTTPSConnection(host, timeout=timeout_s, context=ssl.create_default_context())
    return http.client.HTTPConnection(host, timeout=timeout_s)


def _decode(raw: bytes) -> Any:
    try:
        return json.loads(raw)
    except ValueError:
        return None


def _chunks(response: http.client.HTTPResponse) -> Iterator[bytes]:
    while chunk := response.read1(65536):
        yield chunk
