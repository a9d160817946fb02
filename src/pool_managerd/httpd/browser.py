"""What only a web page would send: browsers let any page send requests to this machine."""

from __future__ import annotations

from collections.abc import Collection

from pool_managerd.errors import RequestError
from pool_managerd.httpd.peers import is_loopback

_OWN_SITE = ("same-origin", "none")
"""``none``: a person typed the address."""


def check_browser(
    host: str | None, origin: str | None, site: str | None, *, local: bool, origins: Collection[str] = ()
) -> None:  # fmt: skip
    """Raises RequestError for a foreign Origin that is not one of ``origins``, and, where only this machine is to call
    (``local``), for a name that was bound to its loopback address. ``site`` is Sec-Fetch-Site: pages send requests without an
    Origin, too, for pictures and links.
    """
    if host is not None and local and not is_loopback(_without_port(host)):
        raise RequestError(
            "cannot serve the request: its Host header does not name this machine's loopback address", code="HOST_REFUSED",
            status=421, hint="call http://127.0.0.1 or http://localhost",
        )  # fmt: skip
    if origin is None and site is not None and site.strip().lower() not in _OWN_SITE:
        raise RequestError("cannot serve a request that a page of another web origin made", code="ORIGIN_REFUSED", status=403)
    if origin is None or origin.lower() in origins:
        return
    if host is None or origin.lower() not in (f"http://{host.lower()}", f"https://{host.lower()}"):
        raise RequestError("cannot serve a request of another web origin", code="ORIGIN_REFUSED", status=403)


def _without_port(host: str) -> str:
    """The name in a Host header; empty where it cannot be one."""
    if host.startswith("["):
        name, bracket, rest = host[1:].partition("]")
        return name if bracket and (not rest or (rest.startswith(":") and rest[1:].isdigit())) else ""
    name, colon, port = host.partition(":")
    return name if not colon or port.isdigit() else ""
