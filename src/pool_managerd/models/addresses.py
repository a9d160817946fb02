"""Which addresses a download may connect to: a name on the internet must not lead into this machine or its network."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable

from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.resolver import ThreadedResolver

_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


class AddressRefusedError(OSError):
    """The host has no address that may be connected to."""


class PublicResolver(AbstractResolver):
    """Looks names up, and answers with public addresses alone, but for hosts that ``is_listed`` names.

    What it answers is what is connected to: nothing looks the name up a second time.
    """

    def __init__(self, is_listed: Callable[[str], bool]) -> None:
        self._is_listed = is_listed
        self._system = ThreadedResolver()

    async def resolve(self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC) -> list[ResolveResult]:
        try:
            found = await self._system.resolve(host, port, family)
        except UnicodeError as problem:  # it has a part that is empty or too long
            raise socket.gaierror(socket.EAI_NONAME, "it is no name of a host") from problem
        public = [one for one in found if self._is_listed(host) or is_public(one["host"])]
        if not public:
            raise AddressRefusedError(f"{host} is at {found[0]['host']}, which is not a public address")
        return public

    async def close(self) -> None:
        await self._system.close()


def is_address(host: str) -> bool:
    """Whether ``host`` is an address and not a name."""
    try:
        ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    """Whether it is this machine, by its address or as ``localhost``."""
    return host == "localhost" or (is_address(host) and ipaddress.ip_address(host.partition("%")[0]).is_loopback)


def is_public(text: str) -> bool:
    """Whether an address is one of the internet, the IPv4 address within an IPv6 one included."""
    address = ipaddress.ip_address(text.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour
        if address in _NAT64:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
    return address.is_global and not address.is_multicast
