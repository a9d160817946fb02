"""What registries want to see before they give anything: tokens, which the logins of other tools get for us.

A login is sent to the registry's own token service and to nobody else, a token to its repository alone.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

from yarl import URL

from pool_managerd.models.addresses import is_address

MAX_TOKEN_BYTES = 64 << 10
_MAX_FILE_BYTES = 1 << 20
_PARAMETER = re.compile(r'(\w+)="([^"]*)"')
_HUB = "https://index.docker.io/v1/"
_HUB_HOST = "registry-1.docker.io"
Ask = Callable[[URL, Mapping[str, str]], Awaitable[bytes]]
"""The body of an answer, by address and headers. Raises AgainError and PoolError."""


class RegistryAccess:
    """``logins``: the value of an Authorization header for a registry's host, None: nobody is logged in there."""

    def __init__(self, logins: Callable[[str], str | None]) -> None:
        self._logins = logins
        self._opened: dict[URL, str | None] = {}

    def enter(self, repository: URL) -> None:
        """Its address, as ``https://HOST/v2/NAME``: what it asks for is answered from now on."""
        self._opened.setdefault(repository, None)

    def knows(self, url: URL) -> bool:
        """Whether it is of a repository that was entered."""
        return self._repository(url) is not None

    def headers(self, url: URL) -> dict[str, str]:
        """For a request to ``url``."""
        repository = self._repository(url)
        token = None if repository is None else self._opened[repository]
        return {} if token is None else {"Authorization": token}

    async def answer(self, url: URL, challenge: str, ask: Ask) -> bool:
        """``url`` was refused with that WWW-Authenticate header. Whether it may be asked again now."""
        repository = self._repository(url)
        if repository is None:
            return False
        login = self._logins(str(repository.authority).removesuffix(":443"))
        kind, said = challenge.partition(" ")[0].lower(), dict(_PARAMETER.findall(challenge[:8192]))
        if kind == "basic":
            token = login
        elif kind == "bearer" and (realm := _service(said.get("realm", ""), repository)) is not None:
            scope = f"repository:{repository.path.removeprefix('/v2/')}:pull"
            where = realm.update_query({"service": said.get("service", ""), "scope": scope})
            theirs = login is not None and _is_of(realm.host or "", repository.host or "")
            token = _token(await ask(where, {"Authorization": login} if theirs and login else {}))
        else:
            token = None
        again = token is not None and token != self._opened[repository]
        self._opened[repository] = token
        return again

    def _repository(self, url: URL) -> URL | None:
        found = (one for one in self._opened if one.origin() == url.origin() and url.path.startswith(f"{one.path}/"))
        return max(found, key=lambda one: len(one.path), default=None)


def _service(realm: str, repository: URL) -> URL | None:
    """Where tokens are given out; never less encrypted than the registry."""
    try:
        url = URL(realm)
    except ValueError:
        return None
    return url if url.host and url.scheme in ("https", repository.scheme) and url.user is None else None


def _is_of(service: str, registry: str) -> bool:
    """Whether they are of one owner, as auth.docker.io and registry-1.docker.io are."""
    domain = registry.partition(".")[2]
    return service == registry or ("." in domain and not is_address(registry) and f".{service}".endswith(f".{domain}"))


def _token(body: bytes) -> str | None:
    try:
        told = json.loads(body)
        token = told.get("token") or told.get("access_token")
    except (ValueError, AttributeError, RecursionError):
        return None
    fits = isinstance(token, str) and token.isascii() and token.isprintable() and " " not in token
    return f"Bearer {token}" if fits else None


def logins_of(env: Mapping[str, str]) -> Callable[[str], str | None]:
    """Of ``podman login`` and ``docker login``: REGISTRY_AUTH_FILE, else config.json of DOCKER_CONFIG or ~/.docker. Read anew
    each time. Helper programs that some keep logins in are not run.
    """
    if path := env.get("REGISTRY_AUTH_FILE"):
        file: Path | None = Path(path)
    elif folder := env.get("DOCKER_CONFIG"):
        file = Path(folder) / "config.json"
    else:
        file = Path(env["HOME"]) / ".docker" / "config.json" if env.get("HOME") else None
    return lambda host: None if file is None else _login(file, host)


def _login(file: Path, host: str) -> str | None:
    try:
        with file.open("rb") as opened:
            auths = json.loads(opened.read(_MAX_FILE_BYTES)).get("auths")
        names = (_HUB, "docker.io", host) if host == _HUB_HOST else (host,)
        found = next((auths[name].get("auth") for name in names if name in auths), None)
        base64.b64decode(found or "", validate=True).decode("utf-8")
    except (OSError, ValueError, AttributeError, TypeError, KeyError, binascii.Error, RecursionError):
        return None
    return f"Basic {found}" if found else None
