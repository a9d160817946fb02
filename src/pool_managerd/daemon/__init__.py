"""The composition root of the standalone daemon: node, control API, metrics, logs, signals and systemd, wired together."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pool_managerd import failpoints
from pool_managerd._version import __version__
from pool_managerd.api.auth import Access, Token, readable_token_file, resolve_access, with_local_token
from pool_managerd.api.server import ApiServer
from pool_managerd.config import Config
from pool_managerd.config.schema import not_in_force
from pool_managerd.config.source import ConfigSource
from pool_managerd.core.redaction import Redactor
from pool_managerd.daemon.configuration import Configuration
from pool_managerd.daemon.gateway_process import GatewayProcess
from pool_managerd.daemon.loop_watch import LoopWatch
from pool_managerd.daemon.rereading import Rereading
from pool_managerd.daemon.signals import Signals
from pool_managerd.errors import PoolError, SpecError
from pool_managerd.gateway.process import check as check_gateway
from pool_managerd.httpd.server import listen, url_of
from pool_managerd.node import PoolManager
from pool_managerd.runtime import confine
from pool_managerd.supervision.upkeep import keep_up
from pool_managerd.telemetry.logs import Logging, LogOptions, configure_logging
from pool_managerd.telemetry.metrics import Metrics
from pool_managerd.telemetry.sd_notify import Notifier
from pool_managerd.telemetry.tracing import exported
from pool_managerd.wiring.adapters import SystemClock, default_adapters


@dataclass(frozen=True, slots=True)
class Served:
    """A node whose control API answers at ``url``."""

    node: PoolManager
    url: str
    server: ApiServer
    metrics: Metrics


def check(config: Config, env: Mapping[str, str]) -> None:
    """Raises SpecError for what the schema cannot see: tokens, addresses off loopback, label names, keys without an effect."""
    resolve_access(config, env)
    if config.gateway.bind is not None:
        check_gateway(config, config.gateway.bind)
    Metrics(config.telemetry.labels)
    if keys := list(not_in_force(config)):
        raise SpecError(
            f"cannot honour {', '.join(keys)}: nothing reads {'it' if len(keys) == 1 else 'them'} in this version",
            code="CONFIG_ERROR", hint="leave it out" if len(keys) == 1 else "leave them out",
        )  # fmt: skip


@contextlib.asynccontextmanager
async def serving(
    config: Config, env: Mapping[str, str], *listeners: Callable[[Any], None], redactor: Redactor | None = None
) -> AsyncIterator[Served]:
    """The node with its control API and metrics, until the block ends; then everything is drained and stopped.

    ``listeners`` see every event from the first on; ``redactor`` learns every secret of the pools.

    Raises SpecError for a configuration that must not be served,
    NodeError when an address or the state directory cannot be had.
    """
    access, token = resolve_access(config, env)
    metrics = Metrics(config.telemetry.labels)
    redactor = redactor or Redactor()
    redactor.know("auth", [] if token is None else [token.value])
    node = PoolManager(config, default_adapters(config, redactor))
    node.claim()  # before the port: a second daemon is told who the first one is, not that its port is taken
    try:
        access = with_local_token(access, config.daemon.state_dir)
        with _sockets(config) as (listener, metrics_listener):
            metrics.attach(node.statuses, node.devices, lambda: node.events.state_trouble is not None)
            metrics.watch_models(node.model_figures)
            for listen_to in (metrics.on_event, *listeners):
                node.events.listen(listen_to)
            async with node:
                server = ApiServer(node, access, metrics)
                try:
                    await server.start(listener, metrics_listener)
                    yield Served(node, url_of(listener), server, metrics)
                finally:
                    await node.shutdown()  # the API goes on answering meanwhile, so that everybody can see how far it is
                    await server.close()
    finally:
        node.unclaim()


@dataclass(frozen=True, slots=True)
class Origin:
    """Where the configuration came from: ``text`` of ``source``. ``watch``: it is applied when the file changes."""

    source: ConfigSource
    text: str
    watch: bool = False


async def serve(config: Config, env: Mapping[str, str], origin: Origin | None = None) -> int:
    """Run the daemon until SIGTERM or SIGINT; a second one stops hard. Returns the exit code.

    With ``origin`` its file can be applied while it runs: on SIGHUP and by requests. The code is 0 after a clean stop, 1 when
    one of the daemon's own tasks failed so often that it did not trust itself any more.

    Raises what ``serving`` raises.
    """
    _close_to_others()
    _stay_when_memory_runs_out()
    told = failpoints.arm(env)
    telemetry = config.telemetry
    logs = configure_logging(LogOptions(__version__, telemetry.log_format, telemetry.labels, telemetry.log_level))
    try:
        if told is not None:
            logs.write("warn", "failpoints", told)
        if config.gateway.bind is not None:
            check_gateway(config, config.gateway.bind)
        _first_lines(logs, config, *resolve_access(config, env))
        with exported(env, "pool-managerd", logs, telemetry.labels):
            return await _serve(config, env, logs, origin)
    except PoolError as error:
        action = "startup_bind_refused" if error.code == "NON_LOOPBACK_WITHOUT_TOKEN" else "refused"  # audited: SEC-AUTH-5002
        fields = {"code": error.code, "hint": error.hint, "bind": config.daemon.bind}
        logs.write("error", action, error.message, fields=fields)
        raise
    finally:
        logs.close()


async def _serve(config: Config, env: Mapping[str, str], logs: Logging, origin: Origin | None) -> int:
    notifier, watch = Notifier(env), LoopWatch(partial(_tell_standstill, logs))
    leave = config.daemon.on_exit == "leave"
    signals = Signals(logs, leave=leave)
    broken: list[BaseException] = []

    def on_fatal(problem: BaseException) -> None:
        broken.append(problem)
        signals.first.set()

    with signals.installed():
        starting = asyncio.create_task(notifier.extend_timeout())  # what is left of an earlier daemon may take its time to end
        async with serving(config, env, logs.log_event, redactor=logs.redactor) as served:
            starting.cancel()
            logs.write(
                "info", "serving", f"The control API answers at {served.url}", fields={"url": served.url, "pid": os.getpid()}
            )
            served.node.on_fatal(on_fatal)
            served.metrics.watch_loop(watch.lag_seconds)
            watch.start()
            rereading = _rereading(origin, config, env, served, logs)
            signals.on_hang_up = rereading
            notifier.ready(_status_line(served))
            keeping = [asyncio.create_task(notifier.keep_alive(partial(_status_line, served)))]
            if (gateway := _gateway(origin, config, served)) is not None:
                work = keep_up(gateway.run, "the gateway", SystemClock(), served.node.events, on_fatal)
                keeping.append(asyncio.create_task(work))
            if rereading is not None and origin is not None and origin.watch:
                what = "the watch of the configuration file"
                watching = keep_up(rereading.watch, what, SystemClock(), served.node.events, on_fatal)
                keeping.append(asyncio.create_task(watching))
            await signals.first.wait()
            for task in keeping:
                task.cancel()
            notifier.send("STOPPING=1")
            ending = asyncio.create_task(notifier.extend_timeout())
            if gateway is not None and not leave:
                await gateway.stop()
            await stop_node(served.node, signals)
            ending.cancel()
            watch.stop()
    if broken:
        logs.write("critical", "stopped", f"The daemon stopped because of an internal error: {broken[0]!r}")
        return 1
    engines = "its engines go on, for the next daemon" if leave else "its engines are down"
    logs.write("info", "stopped", f"The daemon stopped; {engines}")
    return 0


def _rereading(origin: Origin | None, config: Config, env: Mapping[str, str], served: Served, logs: Logging) -> Rereading | None:
    """What applies the daemon's file, from now on by requests as well; None where it has none."""
    if origin is None:
        return None
    configuration = Configuration(origin.source, env, served.node, served.server, logs)
    configuration.started(origin.text, config)
    served.server.use_configuration(configuration)
    return Rereading(configuration, served.node.events)


def _gateway(origin: Origin | None, config: Config, served: Served) -> GatewayProcess | None:
    """What keeps the gateway running; None where none is configured."""
    bind = config.gateway.bind
    if bind is None:
        return None
    file = () if origin is None else ("--config", str(origin.source.path))
    arguments = (*file, "--url", served.url, "--bind", bind)
    node, settings = served.node, config.gateway.model_dump_json()
    objection = partial(_no_gateway, config, bind)
    return GatewayProcess(arguments, settings, config.daemon.runtime_dir, node.events, node.gateway_is_gone, objection)


def _no_gateway(config: Config, bind: str) -> str | None:
    """Why none could answer there, as far as that shows."""
    try:
        check_gateway(config, bind)
        listen(bind).close()
    except PoolError as problem:
        return problem.message
    return None


def _status_line(served: Served) -> str:
    """What `systemctl status` shows."""
    pools = served.node.registry.snapshots()
    ready = sum(bool(pool.ready) for pool in pools)
    return f"serving at {served.url}; {ready} of {len(pools)} pools ready"


def _tell_standstill(logs: Logging, seconds: float, stack: str) -> None:
    human = f"The event loop has not turned for {seconds:.0f} s; where it stands is in the field stack"
    logs.write("critical", "loop_standstill", human, fields={"seconds": round(seconds, 1), "stack": stack})


async def stop_node(node: PoolManager, stopping: Signals) -> None:
    """Drain and stop; a second signal cuts the drains short and kills."""
    gentle = asyncio.create_task(node.shutdown())
    second = asyncio.create_task(stopping.second.wait())
    try:
        await asyncio.wait({gentle, second}, return_when=asyncio.FIRST_COMPLETED)
        if not gentle.done():
            await node.shutdown(hard=True)
        await gentle
    finally:
        second.cancel()


def _close_to_others() -> None:
    """An engine that shares our uid can then read neither our memory nor our environment, nor trace us.

    It costs core dumps of the daemon, and that its own user may attach a profiler.
    """
    with contextlib.suppress(OSError):
        confine.prctl(confine.PR_SET_DUMPABLE, 0)


def _stay_when_memory_runs_out() -> None:
    """The kernel takes an engine first, which is started again. Only root may ask for that; engines have a value of their own."""
    with contextlib.suppress(OSError), Path("/proc/self/oom_score_adj").open("wb", buffering=0) as file:
        file.write(b"-900")


def _first_lines(logs: Logging, config: Config, access: Access, token: Token | None) -> None:
    if config.profile == "dev":
        logs.write("warn", "profile", "Profile dev: engines may run on CPU here, where the other profiles demand a GPU")
    if token is not None:
        optional = ", which loopback callers may leave out" if access.optional_on_loopback else ""
        if (loose := readable_token_file(config)) is not None:
            human = f"Other users can read the token in {loose}: chmod 600 {loose}"
            logs.write("warn", "auth", human, fields={"token_file": str(loose)})
        logs.write("info", "auth", f"The control API asks for a token{optional}", fields={"token_fp6": token.fp6})


@contextlib.contextmanager
def _sockets(config: Config) -> Iterator[tuple[socket.socket, socket.socket | None]]:
    """The listening sockets, taken first: a port that is taken is then known before anything has been started."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(listen(config.daemon.bind))
        extra = None if config.daemon.metrics_bind is None else stack.enter_context(listen(config.daemon.metrics_bind))
        yield listener, extra
