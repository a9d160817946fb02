"""The gateway as a process of its own, until a signal ends it."""

from __future__ import annotations

import asyncio
import signal
import socket
from contextlib import suppress

import structlog

from pool_managerd.config.sections import GatewayConfig
from pool_managerd.gateway.front import FrontLimits
from pool_managerd.gateway.leasing import LeaseTimes
from pool_managerd.gateway.node_link import NodeLink
from pool_managerd.gateway.server import Gateway, GatewayOptions
from pool_managerd.httpd.peers import is_loopback
from pool_managerd.httpd.server import url_of

log = structlog.get_logger("pool_managerd.gateway")


def options_of(config: GatewayConfig, host: str) -> GatewayOptions:
    """What the configuration says, for a gateway that listens at ``host``."""
    limits = FrontLimits(body_bytes=config.max_body_bytes, heartbeat_s=config.heartbeat_ms / 1000)
    return GatewayOptions(
        limits, leases=LeaseTimes(linger_s=config.linger_ms / 1000), local=is_loopback(host),
        origins=tuple(origin.lower().rstrip("/") for origin in config.cors_origins),
    )  # fmt: skip


async def serve(link: NodeLink, listener: socket.socket, options: GatewayOptions) -> None:
    """Until SIGTERM or SIGINT; running requests have a moment then, and a second signal ends it at once."""
    loop, ending = asyncio.get_running_loop(), asyncio.Event()
    serving = asyncio.current_task()

    def on_signal() -> None:
        if ending.is_set() and serving is not None:
            serving.cancel()
        ending.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    with suppress(asyncio.CancelledError):
        async with Gateway(link, options) as gateway:
            following = asyncio.create_task(gateway.run())
            try:
                await gateway.start(listener)
                log.info(f"The gateway answers at {url_of(listener)}", action="serving", url=url_of(listener))
                stopping = asyncio.create_task(ending.wait())
                await asyncio.wait({following, stopping}, return_when=asyncio.FIRST_COMPLETED)
                if following.done():
                    following.result()
            finally:
                following.cancel()
    log.info("The gateway stopped", action="stopped")
