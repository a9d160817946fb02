"""Who may call (SPEC §16): the shared bearer token, and the Host and Origin rules that keep web pages out."""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from pool_managerd.config import Config, split_address
from pool_managerd.errors import NodeError, RequestError, SpecError
from pool_managerd.httpd.browser import check_browser
from pool_managerd.httpd.peers import LOCAL_TOKEN, is_loopback

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
    """The rules of one daemon. ``token_digest`` None = no token is configured (loopback only).

    Where no token is asked for (an open loopback address), changes and what shows the text of engines or of the
    configuration are for ``owner_uid`` and root, or for whoever has the local token (``local_digest``). ``former_digest`` is the
    token that another one has replaced; it holds for some minutes more.
    """

    bind_host: str
    token_digest: bytes | None = field(default=None, repr=False)
    optional_on_loopback: bool = False
    local_digest: bytes | None = field(default=None, repr=False)
    former_digest: bytes | None = field(default=None, repr=False)
    local_token_path: str = ""
    owner_uid: int = field(default_factory=os.geteuid)

    @property
    def loopback_bind(self) -> bool:
        return is_loopback(self.bind_host)

    def open_to(self, *, peer_is_loopback: bool) -> bool:
        """Whether the peer may leave the token out."""
        return self.token_digest is None or (self.optional_on_loopback and peer_is_loopback)

    def trusts(self, header: str | None, uid: Callable[[], int | None]) -> bool:
        """Whether an open daemon takes the caller for its owner: by the peer's uid, or by one of the tokens."""
        known = uid()
        return (known is not None and known in (0, self.owner_uid)) or self.bears_token(header)

    def is_owner(self, header: str | None, uid: Callable[[], int | None]) -> bool:
        """Whether the caller is the daemon's own user or root on this machine: the kernel says so, or the token that only they
        can read. The configured token does not: it may be shared.
        """
        known, given = uid(), _bearer(header)
        if known is not None and known in (0, self.owner_uid):
            return True
        if given is None or self.local_digest is None:
            return False
        digest = hashlib.sha256(given.encode("utf-8", "surrogateescape")).digest()
        return hmac.compare_digest(digest, self.local_digest)

    def bears_token(self, header: str | None) -> bool:
        """Whether ``header`` (Authorization) carries a token of this daemon."""
        given = _bearer(header)
        if given is None:
            return False
        # Both sides are hashed first: equal lengths, and no prefix of the secret shows in the time taken.
        digest = hashlib.sha256(given.encode("utf-8", "surrogateescape")).digest()
        known = (self.token_digest, self.local_digest, self.former_digest)
        return any(hmac.compare_digest(digest, one) for one in known if one is not None)

    def check_token(self, header: str | None, *, peer_is_loopback: bool) -> None:
        """Raises RequestError 401 unless ``header`` carries the token (AUTH-1001) or none is needed."""
        if not self.open_to(peer_is_loopback=peer_is_loopback) and not self.bears_token(header):
            hint = "send the header Authorization: Bearer TOKEN"
            raise _unauthorised("cannot serve the request", _bearer(header) is not None, hint)

    def check_owner(self, header: str | None, uid: Callable[[], int | None]) -> None:
        """Raises RequestError 401 unless an open daemon takes the caller for its owner."""
        if self.trusts(header, uid):
            return
        known = uid()
        who = "an unknown user" if known is None else f"uid {known}"
        token = f"send the token in {self.local_token_path} (Authorization: Bearer TOKEN)" if self.local_token_path else ""
        remedies = [f"call as uid {self.owner_uid} or root", token, "configure auth.token_file and share that token"]
        raise _unauthorised(
            f"cannot serve the request for {who}: without a configured token, changes and the output of engines are for"
            " the daemon's own user and root",
            _bearer(header) is not None,
            "; or ".join(filter(None, remedies)),
        )

    def check_browser(
        self, host: str | None, origin: str | None, site: str | None = None, *, tokenless: bool = False
    ) -> None:  # fmt: skip
        """Raises RequestError for what only a web page would send: a foreign Origin or site, or a name rebound to loopback.

        ``tokenless``: a loopback peer that carries no token; a page in a browser on this machine may be that.
        """
        check_browser(host, origin, site, local=self.loopback_bind or tokenless)


def _bearer(header: str | None) -> str | None:
    scheme, _, given = (header or "").strip().partition(" ")
    return given.strip() or None if scheme.lower() == "bearer" else None


def _unauthorised(message: str, bears: bool, hint: str) -> RequestError:
    if bears:
        return RequestError(
            f"{message}: the bearer token is wrong", code="BAD_TOKEN", status=401, hint=hint, details={"auth_code": 40102}
        )
    return RequestError(
        f"{message} without a bearer token" if message.endswith("request") else message,
        code="MISSING_TOKEN", status=401, hint=hint, details={"auth_code": 40101},
    )  # fmt: skip


def with_local_token(access: Access, state_dir: Path) -> Access:
    """``access`` with the local token, where callers may come without the configured one. Raises NodeError."""
    if access.token_digest is not None and not access.optional_on_loopback:
        return access
    return replace(access, local_digest=local_token(state_dir).digest, local_token_path=str((state_dir / LOCAL_TOKEN).absolute()))


def local_token(state_dir: Path) -> Token:
    """The token in ``state_dir``, for the daemon's own user; made at the first start, and anew when others could read it.

    Raises NodeError when it can be neither read nor written.
    """
    path = state_dir / LOCAL_TOKEN
    try:
        if (known := _kept_token(path)) is not None:
            return known
        token = Token(secrets.token_urlsafe(32))
        path.unlink(missing_ok=True)
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600), "w") as file:  # noqa: PTH123
            file.write(token.value + "\n")
    except OSError as error:
        raise NodeError(
            f"cannot keep the local token in {path}: {error.strerror or error}", code="STATE_UNWRITABLE", status=507,
            hint="make the state directory writable, or choose another one with --state-dir",
        ) from error  # fmt: skip
    return token


def _kept_token(path: Path) -> Token | None:
    """None when there is none, or one that somebody else may have seen or put there."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return None
    with os.fdopen(fd, "rb") as file:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
            return None
        value = file.read(_MAX_TOKEN_BYTES).partition(b"\n")[0].strip().decode("ascii", "replace")
    return Token(value) if len(value) >= MIN_TOKEN_CHARS and value.isascii() and value.isprintable() else None


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
    return Access(host, None if token is None else token.digest, _is_optional(env)), token


def readable_token_file(config: Config) -> Path | None:
    """The configured token's file, when other users of this machine can read it; a container's secret often can be."""
    place = _token_file(config)
    return place if place is not None and place.stat().st_mode & 0o044 else None


def _token_file(config: Config) -> Path | None:
    return None if config.auth.token_file is None else config.base_dir / config.auth.token_file


def _token(config: Config, env: Mapping[str, str]) -> Token | None:
    found: dict[str, str] = {}
    if (place := _token_file(config)) is not None:
        found["auth.token_file"] = _read_token(place)
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


def _read_token(place: Path) -> str:
    try:
        with place.open("rb") as file:
            raw = file.read(_MAX_TOKEN_BYTES + 1)
            mode = os.fstat(file.fileno()).st_mode
    except OSError as error:
        raise SpecError(f"cannot read auth.token_file {place}: {error.strerror}", code="CONFIG_ERROR") from error
    if mode & 0o022:
        raise SpecError(
            f"cannot use auth.token_file {place}: other users may write to it, and so choose the token",
            code="CONFIG_ERROR", hint=f"chmod 600 {place}",
        )  # fmt: skip
    value = raw.partition(b"\n")[0].strip().decode("utf-8", "replace")
    if not value or len(raw) > _MAX_TOKEN_BYTES:
        why = "its first line is empty" if not value else f"it has more than {_MAX_TOKEN_BYTES} bytes"
        raise SpecError(
            f"cannot use auth.token_file {place}: {why}", code="CONFIG_ERROR", hint="put the token alone on its first line"
        )
    return value


def _is_optional(env: Mapping[str, str]) -> bool:
    value = env.get("AUTH_OPTIONAL", "").strip().lower()
    if value not in ("", "0", "1", "true", "false", "yes", "no", "on", "off"):
        raise SpecError(f"cannot use AUTH_OPTIONAL={value[:32]!r}: it is neither true nor false", code="CONFIG_ERROR")
    return value in ("1", "true", "yes", "on")
