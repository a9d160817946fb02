"""The gateway as commands ask it, on the standard library alone."""

from __future__ import annotations

import http.client
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import quote, urlsplit

import typer

from pool_managerd.cli.client import DEFAULT_CONFIG
from pool_managerd.cli.exits import REFUSED, UNREACHABLE, USAGE, CommandFailed
from pool_managerd.cli.streams import OutputLostError

if TYPE_CHECKING:
    import ssl

DEFAULT_URL = "http://127.0.0.1:8088"
_MAX_BYTES = 16 << 20
_ANSWER_S, _STREAM_S = 30.0, 600.0
GatewayUrl = Annotated[
    str | None, typer.Option("--url", help="The gateway's address. [POOL_MANAGERD_GATEWAY_URL]", show_default=False)
]
CaFile = Annotated[
    Path | None,
    typer.Option("--ca-file", help="Whom an https gateway is trusted by, instead of the system's; in PEM.", show_default=False),
]


class GatewayClient:
    """Its address, and the key for it (POOL_MANAGERD_API_KEY); ``tls`` None: over https the system says whom to trust."""

    def __init__(self, url: str, key: str | None, tls: ssl.SSLContext | None = None) -> None:
        self.url, self._key, self._tls = url.rstrip("/"), key, tls

    def call(self, method: str, *path: str) -> Any:
        """The decoded answer. Raises CommandFailed: unreachable (3) or refused (4)."""
        with self._answer(method, "/v1/" + "/".join(quote(part, safe="") for part in path), None, _ANSWER_S) as answer:
            return json.loads(answer.read(_MAX_BYTES))

    def page(self, path: str, timeout_s: float = _ANSWER_S) -> str:
        """A page of text. Raises CommandFailed: unreachable (3) or refused (4)."""
        with self._answer("GET", path, None, timeout_s) as answer:
            return answer.read(_MAX_BYTES).decode("utf-8", "replace")

    def stream(self, path: str, body: Any) -> Iterator[dict[str, Any]]:
        """The events of a streamed answer. Raises CommandFailed, for an error in the stream, too."""
        with self._answer("POST", path, body, _STREAM_S) as answer:
            if not (answer.headers.get("Content-Type") or "").startswith("text/event-stream"):
                raise CommandFailed("cannot read the answer: the engine was asked for a stream, and sent none", REFUSED)
            while line := answer.readline(_MAX_BYTES):
                if not line.startswith(b"data:") or line.startswith(b"data: [DONE]"):
                    continue
                event = _decoded(line[5:])
                if "error" in event:
                    raise CommandFailed(_message(event["error"]), REFUSED)
                yield event

    @contextmanager
    def _answer(self, method: str, path: str, body: Any, timeout_s: float) -> Iterator[http.client.HTTPResponse]:
        parts = urlsplit(self.url)
        connection = (
            http.client.HTTPSConnection(parts.netloc, timeout=timeout_s, context=self._tls)
            if parts.scheme == "https"
            else http.client.HTTPConnection(parts.netloc, timeout=timeout_s)
        )
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self._key}"} if self._key else {})
        try:
            connection.request(method, parts.path + path, None if body is None else json.dumps(body), headers)
            with connection.getresponse() as answer:
                if answer.status >= 400:
                    raise _refused(answer)
                yield answer
        except OutputLostError:
            raise
        except (OSError, http.client.HTTPException) as error:
            untrusted = "CERTIFICATE_VERIFY_FAILED" in str(error)
            raise CommandFailed(
                f"cannot reach the gateway at {self.url}: {str(error) or type(error).__name__}", UNREACHABLE,
                hint="call it by a name of its certificate, and say with --ca-file whom that is trusted by" if untrusted else
                "set gateway.bind and serve, or run `pool-managerd gateway`; or say where it is with --url",
            ) from error  # fmt: skip
        finally:
            connection.close()


def find_gateway(url: str | None, config: Path | None, ca_file: Path | None = None) -> GatewayClient:
    """The one meant by ``--url``, POOL_MANAGERD_GATEWAY_URL, the configuration's gateway.bind, or the default address. One of the
    configuration is known by its certificate.
    """
    key = os.environ.get("POOL_MANAGERD_API_KEY", "").strip() or None
    given = url or os.environ.get("POOL_MANAGERD_GATEWAY_URL")
    chosen, tls = (given, None) if given else _configured(config) or (DEFAULT_URL, None)
    try:
        parts = urlsplit(chosen)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is none
        usable = False
    if not usable:
        raise CommandFailed(f"cannot use {chosen!r} as the gateway's URL", USAGE, hint=f"write it as {DEFAULT_URL}")
    return GatewayClient(chosen, key, tls if ca_file is None else _trusted(ca_file))


def _trusted(ca_file: Path) -> ssl.SSLContext:
    import ssl

    try:
        return ssl.create_default_context(cafile=ca_file)
    except OSError as error:
        why = "it holds no certificates in PEM" if isinstance(error, ssl.SSLError) else error.strerror
        raise CommandFailed(f"cannot use --ca-file {ca_file}: {why}", USAGE) from error


def _configured(config: Path | None) -> tuple[str, ssl.SSLContext | None] | None:
    path = config or (DEFAULT_CONFIG if DEFAULT_CONFIG.is_file() else None)
    if path is None:
        return None
    from pool_managerd.config.load import load_config

    loaded = load_config(path, env=os.environ)
    bind = loaded.gateway.bind
    if bind is None:
        return None
    host, _, port = bind.rpartition(":")
    address = f"{ {'0.0.0.0': '127.0.0.1', '[::]': '[::1]'}.get(host, host) }:{port}"  # noqa: S104
    if loaded.gateway.tls_cert is None:
        return f"http://{address}", None
    from pool_managerd.gateway.certificate import certificate_files, trusting

    files = certificate_files(loaded)
    try:
        return f"https://{address}", None if files is None else trusting(files.cert)
    except OSError as error:
        raise CommandFailed(f"cannot tell the gateway by its certificate: {error}", USAGE) from error


def _decoded(data: bytes) -> dict[str, Any]:
    """One event. Raises CommandFailed for what is no JSON object."""
    try:
        event = json.loads(data)
    except ValueError:
        event = None
    if not isinstance(event, dict):
        raise CommandFailed("cannot read the answer: an event of its stream is no JSON object", REFUSED)
    return event


def _message(error: Any) -> str:
    """Of an error in a stream, in whatever shape an engine tells it."""
    return str(error.get("message") if isinstance(error, dict) else error)


def _refused(answer: http.client.HTTPResponse) -> CommandFailed:
    try:
        error = json.loads(answer.read(_MAX_BYTES))["error"]
        return CommandFailed(str(error["message"]), REFUSED, code=error.get("code"))
    except (ValueError, KeyError, TypeError):
        return CommandFailed(f"cannot do it: the gateway answered {answer.status}", REFUSED)
