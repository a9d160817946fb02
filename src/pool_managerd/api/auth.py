"""Who may call (SPEC §16): the shared bearer token, and the Host and Origin rules that keep web pages out."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pool_managerd.config import Config, split_address
from pool_managerd.errors import RequestError, SpecError

MIN_TOKEN_CHARS = 32
_MAX_TOKEN_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Token:
    """The shared secret. Neither its repr nor anything logged shows more than ``fp6``."""

    value: str = field(repr=False)

    @property
    def digest(self) -> bytes:
        return hashlib.sha256(self.value.encode()).digest()

    @property
    def fp6(self) -> str:
        return self.digest.hex()[:6]


@dataclass(frozen=True, slots=True)
class Access:
    """The rules of one daemon. ``token_digest`` None = no token is asked for (loopback only)."""

    bind_host: str
    token_digest: bytes | None = field(default=None, repr=False)
    optional_on_loopback: bool = False

    @property
    def loopback_bind(self) -> bool:
        return is_loopback(self.bind_host)

    def check_token(self, header: str | None, *, peer_is_loopback: bool) -> None:
        """Raises RequestError 401 unless ``header`` carries the token (AUTH-1001) or none is needed."""
        if self.token_digest is None or (self.optional_on_loopback and peer_is_loopback):
            return
        scheme, _, given = (header or "").strip().partition(" ")
        given = given.strip()
        if scheme.lower() != "bearer" or not given:
            raise RequestError(
                "cannot serve the request without a bearer token",
                code="MISSING_TOKEN",
                status=401,
                hint="send the header Authorization: Bearer TOKEN",
                details={"auth_code": 40101},
            )
        # Both sides are hashed first: equal lengths, and no prefix of the secret shows in the time taken.
        digest = hashlib.sha256(given.encode("utf-8", "surrogateescape")).digest()
        if not hmac.compare_digest(digest, self.token_digest):
            raise RequestError(
                "cannot serve the request: the bearer token is wrong", code="BAD_TOKEN", status=401, details={"auth_code": 40102}
            )

    def check_browser(self, host: str | None, origin: str | None) -> None:
        """Raises RequestError for what only a web page would send: a foreign Origin, or a rebound Host on loopback."""
        if host is not None and self.loopback_bind and not self._host_allowed(host):
            raise RequestError(
                "cannot serve the request: its Host header does not name this machine's loopback address",
                code="HOST_REFUSED",
                status=421,
                hint="call http://127.0.0.1 or http://localhost",
            )
        if origin is not None and (host is None or origin.lower() not in (f"http://{host.lower()}", f"https://{host.lower()}")):
            raise RequestError("cannot serve a request of another web origin", code="ORIGIN_REFUSED", status=403)

    def _host_allowed(self, host: str) -> bool:
        name = _without_port(host)
        return name is not None and (is_loopback(name) or name.lower() == self.bind_host.lower())


def resolve_access(config: Config, env: Mapping[str, str]) -> tuple[Access, Token | None]:
    """The access rules from the configuration and the environment.

    Raises SpecError when two sources disagree, when the token is unusable, and for an address off loopback without
    a token of at least 32 characters (AUTH-1002, SEC-AUTH-4002).
    """
    token = _token(config, env)
    host, _ = split_address(config.daemon.bind)
    if not is_loopback(host):
        if token is None:
            raise SpecError(
                f"cannot bind the control API to {config.daemon.bind} without a token: whoever reaches it can run programs",
                code="NON_LOOPBACK_WITHOUT_TOKEN",
                status=403,
                hint="set auth.token_file or AUTH_TOKEN, or bind to 127.0.0.1",
                details={"auth_code": 40301},
            )
        if len(token.value) < MIN_TOKEN_CHARS:
            raise SpecError(
                f"cannot bind the control API to {config.daemon.bind}: the token has fewer than {MIN_TOKEN_CHARS} characters",
                code="CONFIG_ERROR",
                hint="make one with: python3 -c 'import secrets; print(secrets.token_urlsafe(32))'",
            )
    optional = _flag(env, "AUTH_OPTIONAL")
    return Access(host, None if token is None else token.digest, optional), token


def is_loopback(host: str) -> bool:
    """True for ``localhost``, 127.0.0.0/8 and ::1, also in its IPv4-mapped form (SEC-AUTH-2004)."""
    name = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if name.lower() == "localhost":
        return True
    try:
        address = ipaddress.ip_address(name.partition("%")[0])
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return bool((mapped or address).is_loopback)


def _without_port(host: str) -> str | None:
    if host.startswith("["):
        name, bracket, rest = host[1:].partition("]")
        return name if bracket and (not rest or (rest.startswith(":") and rest[1:].isdigit())) else None
    name, colon, port = host.partition(":")
    return name if not colon or port.isdigit() else None


def _token(config: Config, env: Mapping[str, str]) -> Token | None:
    found: dict[str, str] = {}
    if config.auth.token_file is not None:
        found["auth.token_file"] = _read_token(config.auth.token_file, config.base_dir)
    for name in ("AUTH_TOKEN", "LLORCH_API_TOKEN"):
        if env.get(name, "").strip():
            found[name] = env[name].strip()
    if len(set(found.values())) > 1:
        raise SpecError(f"cannot choose a token: {' and '.join(found)} differ", code="CONFIG_ERROR", hint="keep one of them")
    for source, value in found.items():
        if not all("!" <= c <= "~" for c in value):
            raise SpecError(
                f"cannot use the token of {source}: it holds blanks or characters that a header cannot carry", code="CONFIG_ERROR"
            )
        return Token(value)
    return None


def _read_token(path: Path, base_dir: Path) -> str:
    place = path if path.is_absolute() else base_dir / path
    try:
        with place.open("rb") as file:
            raw = file.read(_MAX_TOKEN_BYTES + 1)
    except OSError as error:
        raise SpecError(f"cannot read auth.token_file {place}: {error.strerror}", code="CONFIG_ERROR") from error
    value = raw.partition(b"\n")[0].strip().decode("utf-8", "replace")
    if not value or len(raw) > _MAX_TOKEN_BYTES:
        why = "its first line is empty" if not value else f"it has more than {_MAX_TOKEN_BYTES} bytes"
        raise SpecError(
            f"cannot use auth.token_file {place}: {why}", code="CONFIG_ERROR", hint="put the token alone on its first line"
        )
    return value


def _flag(env: Mapping[str, str], name: str) -> bool:
    value = env.get(name, "").strip().lower()
    if value not in ("", "0", "1", "true", "false", "yes", "no", "on", "off"):
        raise SpecError(f"cannot use {name}={value[:32]!r}: it is neither true nor false", code="CONFIG_ERROR")
    return value in ("1", "true", "yes", "on")
