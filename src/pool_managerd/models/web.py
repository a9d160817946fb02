"""One GET of a download: each redirect checked anew, the token for the hub alone, nothing waited for without end."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from email.utils import parsedate_to_datetime
from pathlib import Path
from time import time

import aiohttp
from yarl import URL

from pool_managerd.config import PolicyConfig
from pool_managerd.errors import NodeError, PoolError, SpecError
from pool_managerd.models.addresses import AddressRefusedError, PublicResolver
from pool_managerd.models.bandwidth import Bandwidth
from pool_managerd.models.buckets import BucketAccess
from pool_managerd.models.fetch_rules import check_url, denied, is_listed, shown
from pool_managerd.models.hub_access import HubAccess
from pool_managerd.models.registry_access import MAX_TOKEN_BYTES, RegistryAccess

MAX_REDIRECTS = 8
READ_BYTES = 1 << 20
_REDIRECTS = (301, 302, 303, 307, 308)
_LATER = frozenset({408, 425, 429})


class AgainError(Exception):
    """It did not work this time. ``retry_after_s`` is what the server asked for."""

    def __init__(self, why: str, retry_after_s: float | None = None) -> None:
        super().__init__(why)
        self.retry_after_s = retry_after_s


def trusting(ca_file: Path | None) -> ssl.SSLContext | None:
    """Who is trusted: the system's authorities, and those in ``ca_file``. Blocks. Raises SpecError CONFIG_ERROR."""
    if ca_file is None:
        return None
    trusted = ssl.create_default_context()
    try:
        trusted.load_verify_locations(ca_file)
    except OSError as problem:  # ssl.SSLError is one
        why = problem.strerror if problem.errno and not isinstance(problem, ssl.SSLError) else "there is no certificate in it"
        raise SpecError(f"cannot use models.ca_file {ca_file}: {why}", code="CONFIG_ERROR", hint="give a file in PEM") from None
    return trusted


class Web:
    """A session with the servers that models come from; ``policy`` is the one in force. Made in the event loop, when needed."""

    def __init__(
        self, policy: Callable[[], PolicyConfig], hub: HubAccess, *, stall_s: float = 30.0, tls: ssl.SSLContext | None = None,
        proxy: str | None = None, bytes_per_s: int | None = None, logins: Callable[[str], str | None] = lambda _host: None,
        buckets: BucketAccess | None = None,
    ) -> None:  # fmt: skip
        self.hub, self.bandwidth, self.registries = hub, Bandwidth(bytes_per_s), RegistryAccess(logins)
        self.buckets = buckets or BucketAccess()
        self._proxy = None if proxy is None else URL(proxy)
        self._policy = policy
        self._timeout = aiohttp.ClientTimeout(total=None, connect=60, sock_connect=20, sock_read=stall_s)
        self._tls = tls
        self._session: aiohttp.ClientSession | None = None

    @property
    def policy(self) -> PolicyConfig:
        """The one in force."""
        return self._policy()

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    def _opened(self) -> aiohttp.ClientSession:
        if self._session is None:
            resolver = PublicResolver(lambda host: self._is_proxy(host) or is_listed(self._policy(), host))
            connector = aiohttp.TCPConnector(
                resolver=resolver, use_dns_cache=False, limit=32, ssl=True if self._tls is None else self._tls
            )
            self._session = aiohttp.ClientSession(
                connector=connector, timeout=self._timeout, cookie_jar=aiohttp.DummyCookieJar(), auto_decompress=False,
                read_bufsize=READ_BYTES, trust_env=False, headers={"User-Agent": "pool-managerd", "Accept-Encoding": "identity"},
            )  # fmt: skip
        return self._session

    @property
    def may_be_plain(self) -> bool:
        """Whether policy allows what is not encrypted."""
        return "http" in self._policy().allow_schemes

    async def read(self, url: URL, headers: Mapping[str, str], limit: int) -> bytes:
        """A small answer as a whole. Raises as ``get``, and NodeError where it is longer than ``limit`` bytes."""
        body = bytearray()
        async with self.get(url, headers) as response:
            async for chunk in response.content.iter_any():
                body += chunk
                if len(body) > limit:
                    raise NodeError(f"cannot use {shown(url)}: it is longer than {limit} bytes", retriable=False)
        return bytes(body)

    @asynccontextmanager
    async def get(self, url: URL, headers: Mapping[str, str]) -> AsyncIterator[aiohttp.ClientResponse]:
        """The answer with the content: 200, 206 or 416. Raises AgainError for what may go away, PoolError for what will not."""
        try:
            response = await self._follow(url, headers)
            try:
                yield response
            finally:
                response.close()
        except (aiohttp.ClientProxyConnectionError, aiohttp.ClientHttpProxyError) as problem:
            raise self._no_way(problem) from None
        except TimeoutError:
            raise AgainError(f"{url.host} sends nothing") from None
        except (aiohttp.ClientConnectorCertificateError, aiohttp.ClientConnectorSSLError) as problem:
            raise NodeError(
                f"cannot fetch {shown(url)}: the certificate of {problem.host} cannot be trusted: {problem}", retriable=False,
                hint="have models.ca_file name the authorities to be trusted, if it is your own server",
            ) from None  # fmt: skip
        except aiohttp.ClientConnectorDNSError as problem:
            if isinstance(problem.os_error, AddressRefusedError):
                hint = f"add {problem.host} to policy.allow_domains if it is meant"
                raise denied(shown(url), str(problem.os_error), hint) from None
            raise AgainError(f"{problem.host} cannot be found") from None
        except (aiohttp.ClientError, ConnectionError) as problem:
            raise AgainError(f"the connection was lost ({type(problem).__name__})") from None

    async def _follow(self, url: URL, headers: Mapping[str, str]) -> aiohttp.ClientResponse:
        here, before, asked = await self.buckets.opened(url), None, False
        for _ in range(MAX_REDIRECTS + 1):
            check_url(self._policy(), here, before)
            if self.hub.offline and self._is_hub(here):
                raise denied(shown(url), "HF_HUB_OFFLINE is set", "unset it for the daemon, or have the model here before")
            told = {**headers, **self._token_for(here), **self.registries.headers(here)}
            response = await self._opened().get(here, allow_redirects=False, headers=told, proxy=self._proxy)
            if response.status == 401 and not asked and (challenge := response.headers.get("WWW-Authenticate")):
                asked = True
                if await self.registries.answer(here, challenge, lambda at, shows: self.read(at, shows, MAX_TOKEN_BYTES)):
                    response.release()
                    continue
            if response.status not in _REDIRECTS:
                if (problem := _problem(response, url, here, self._hint(url))) is not None:
                    response.close()
                    raise problem
                return response
            response.release()
            before, here = here, _target(here, response.headers.get("Location", ""))
        raise SpecError(f"cannot fetch {shown(url)}: it is redirected more than {MAX_REDIRECTS} times")

    def _hint(self, url: URL) -> str:
        """What to do where it is refused."""
        if self._is_hub(url):
            return "see whether the name is right; a private or gated one needs a HF_TOKEN that may read it"
        if self.registries.knows(url):
            return "see whether the name is right; a private one needs a login of the daemon's user: podman login, docker login"
        return self.buckets.hint(url) or "see whether the address is right, and open to everybody"

    def _is_proxy(self, host: str) -> bool:
        return self._proxy is not None and host == self._proxy.host

    def _no_way(self, problem: aiohttp.ClientProxyConnectionError | aiohttp.ClientHttpProxyError) -> PoolError | AgainError:
        """Of a proxy that is not there, or does not want to."""
        if not isinstance(problem, aiohttp.ClientHttpProxyError):
            return AgainError(f"models.proxy {self._proxy} cannot be reached")
        if problem.status in _LATER or problem.status >= 500:
            return AgainError(f"models.proxy {self._proxy} answers {problem.status}")
        return SpecError(
            f"cannot fetch it: models.proxy {self._proxy} answers {problem.status}", status=403,
            hint="have the proxy let this machine through without credentials, or leave models.proxy out",
        )  # fmt: skip

    def _token_for(self, url: URL) -> dict[str, str]:
        """Nobody but the hub itself gets it, wherever the hub redirects to."""
        return {"Authorization": f"Bearer {self.hub.token}"} if self.hub.token and self._is_hub(url) else {}

    def _is_hub(self, url: URL) -> bool:
        return url.origin() == self.hub.endpoint.origin()


def _target(here: URL, location: str) -> URL:
    try:
        target = here.join(URL(location, encoded=True)).with_fragment(None)
        _ = target.host, target.port  # an encoded one is not looked at before
        return target
    except ValueError:
        raise SpecError(f"cannot fetch {shown(here)}: it redirects to what is no address") from None


def _problem(response: aiohttp.ClientResponse, url: URL, here: URL, hint: str) -> PoolError | AgainError | None:
    status, what = response.status, shown(url)
    if status in (200, 206, 416):
        if response.headers.get("Content-Encoding", "identity") != "identity":
            return SpecError(f"cannot fetch {what}: it is sent compressed, though that was not asked for")
        return None
    if status in _LATER or status >= 500:
        return AgainError(f"{here.host} answers {status}", _retry_after_s(response.headers.get("Retry-After", "")))
    if status in (401, 403) and here.origin() != url.origin():  # a signed address that is over: the next try gets another
        return AgainError(f"{here.host} answers {status}")
    if status in (401, 403):
        return SpecError(f"cannot fetch {what}: {here.host} refuses it ({status})", status=403, hint=hint)
    return SpecError(f"cannot fetch {what}: {here.host} answers {status}", status=422, hint="see whether the name is right")


def _retry_after_s(text: str) -> float | None:
    """Seconds, or a date."""
    if text.strip().isdecimal():
        return float(text.strip()[:9])
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time())
    except (ValueError, TypeError, OverflowError):
        return None
