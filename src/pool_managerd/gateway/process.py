"""The gateway as a process of its own, until a signal ends it."""

from __future__ import annotations

import asyncio
import gc
import os
import resource
import signal
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from threading import Thread

import structlog

from pool_managerd.config import Config, split_address
from pool_managerd.errors import SpecError
from pool_managerd.gateway.bodies import BodyLimits
from pool_managerd.gateway.certificate import Certificate, certificate_files
from pool_managerd.gateway.front import FrontLimits
from pool_managerd.gateway.keys import key_file
from pool_managerd.gateway.leasing import LeaseTimes
from pool_managerd.gateway.node_link import NodeLink
from pool_managerd.gateway.server import Gateway, GatewayOptions
from pool_managerd.gateway.sessions import SessionNames
from pool_managerd.gateway.sharing import WORKER, Common
from pool_managerd.httpd.peers import is_loopback

_DESCRIPTORS = 65_536
_BEAT_S, _LAST_WORDS_S, _ORPHAN_S = 1.0, 0.5, 15.0
_BODIES_BYTES = 512 << 20
"""Of all requests that a gateway has at the same time."""
log = structlog.get_logger("pool_managerd.gateway")


def check(config: Config, bind: str) -> None:
    """Raises SpecError for an address that others reach, without keys; and for keys or a certificate that cannot be used."""
    keys = key_file(config.base_dir, config.gateway.keys_file)
    if keys is not None:
        keys.all()
    elif not is_loopback(split_address(bind)[0]):
        raise SpecError(
            f"cannot bind the gateway to {bind} without API keys: whoever reaches it could use the GPUs",
            code="NON_LOOPBACK_WITHOUT_TOKEN", status=403,
            hint="set gateway.keys_file and make a key with `pool-managerd keys add NAME`, or bind to 127.0.0.1",
        )  # fmt: skip
    if (files := certificate_files(config)) is not None:
        files.context()


def options_of(config: Config, bind: str) -> GatewayOptions:
    """What the configuration says, for a gateway that listens at ``bind``. Raises SpecError as ``check``."""
    check(config, bind)
    if config.gateway.workers > 1 and WORKER in config.telemetry.labels:
        raise SpecError(
            f"cannot use telemetry.labels key {WORKER!r} with gateway.workers: its series have a label of that name",
            code="CONFIG_ERROR", hint="name it otherwise, or set gateway.workers to 1",
        )  # fmt: skip
    own, files = config.gateway, certificate_files(config)
    all_bytes = _BODIES_BYTES // own.workers
    return GatewayOptions(
        FrontLimits(BodyLimits(own.max_body_bytes, max(own.max_body_bytes, all_bytes)), own.heartbeat_ms / 1000),
        leases=LeaseTimes(linger_s=own.linger_ms / 1000, wait_s=config.queue.wait_ms / 1000),
        keys=key_file(config.base_dir, own.keys_file), certificate=None if files is None else Certificate(files),
        local=is_loopback(split_address(bind)[0]), origins=tuple(origin.lower().rstrip("/") for origin in own.cors_origins),
        sessions=SessionNames(own.session_headers), loading_text=own.loading_text,
        capture_bytes=own.capture_bytes // own.workers,
        labels=config.telemetry.labels, narrate=config.telemetry.log_level == "debug",
    )  # fmt: skip


def _settle_in() -> None:
    """As many connections as this process may have; and what is there stays, so that it is not searched for garbage again and
    again: a full search stops every stream for tens of milliseconds.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _DESCRIPTORS)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


async def _follow(gateway: Gateway, common: Common) -> None:
    """The daemon; and whoever keeps this worker running knows that its loop turns."""
    following = asyncio.create_task(gateway.run())
    try:
        while common.beats is not None and not following.done():
            common.beats.beat(common.worker)
            await asyncio.wait({following}, timeout=_BEAT_S)
        await following
    finally:
        following.cancel()


def _end_with(pipe: int, loop: asyncio.AbstractEventLoop, on_end: Callable[[], None]) -> None:
    """In a thread of its own, which a loop that stands does not keep: an orphan ends in any case."""
    while os.read(pipe, 1):
        pass
    with suppress(RuntimeError):  # it has ended by itself
        loop.call_soon_threadsafe(on_end)
    time.sleep(_ORPHAN_S)
    os._exit(1)


async def serve(
    link: NodeLink, listener: socket.socket, options: GatewayOptions, common: Common | None = None, ends_with: int | None = None
) -> None:
    """Until SIGTERM or SIGINT; running requests have a moment then, and a second signal ends it at once. ``ends_with`` is the
    reading end of a pipe: when whoever has the other end is gone, so are the leases, and requests end at once.
    """
    _settle_in()
    loop, ending = asyncio.get_running_loop(), asyncio.Event()
    serving = asyncio.current_task()

    common = common or Common()
    with suppress(asyncio.CancelledError):
        async with Gateway(link, options, common) as gateway:

            def on_signal() -> None:
                if ending.is_set() and serving is not None:
                    gateway.end_requests()
                    loop.call_later(_LAST_WORDS_S, serving.cancel)
                ending.set()

            def on_pipe_end() -> None:
                gateway.end_requests()
                ending.set()

            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, on_signal)
            if ends_with is not None:
                watch = Thread(target=_end_with, args=(ends_with, loop, on_pipe_end), daemon=True, name="pipe")
                watch.start()
            following = asyncio.create_task(_follow(gateway, common))
            try:
                url = await gateway.start(listener)
                log.info(f"The gateway answers at {url}", action="serving", url=url, **common.labels())
                stopping = asyncio.create_task(ending.wait())
                await asyncio.wait({following, stopping}, return_when=asyncio.FIRST_COMPLETED)
                if following.done():
                    following.result()
            finally:
                following.cancel()
    log.info("The gateway stopped", action="stopped", **common.labels())
