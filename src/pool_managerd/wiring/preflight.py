"""Preflight of this machine for a configuration: its facts, its wants, and the report over both."""

from __future__ import annotations

import asyncio
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from pool_managerd.config import Config, DaemonConfig, PoolConfig, ProvisioningConfig, split_address
from pool_managerd.core.engines import ENGINES
from pool_managerd.core.gpu.devices import NOT_SCANNED, DeviceScan
from pool_managerd.core.gpu.visibility import restrictions
from pool_managerd.core.preflight import HostFacts, PoolWants, Report, Wants, check
from pool_managerd.engines.modes import mode_of
from pool_managerd.engines.ports import PortAllocator
from pool_managerd.engines.programs import package_installed
from pool_managerd.engines.provisioner import EngineProvisioner
from pool_managerd.errors import PoolError
from pool_managerd.host.facts import gather
from pool_managerd.host.memory import available_ram_bytes, total_ram_bytes
from pool_managerd.host.monitor import NvmlMonitor
from pool_managerd.host.simulation import build_simulated_driver, check_topology, simulated_environment
from pool_managerd.host.worker_process import WorkerOptions, Workers
from pool_managerd.models.fetch_rules import FETCHED
from pool_managerd.runtime.engine_users import check_users, shared_user
from pool_managerd.runtime.isolation import interpreter_needs
from pool_managerd.runtime.reach import ENTER, READ, UNPRIVILEGED, Need, first_obstacle
from pool_managerd.wiring.setups import Tell, probing, setups_of, user_rules

_CUDA_TAG = re.compile(r"(?:cuda-?|cu)(?P<major>1\d)\.?(?P<minor>\d)(?!\d)", re.ASCII)


def preflight_report(
    config: Config, scan: Callable[[], DeviceScan], env: Mapping[str, str], tell: Tell = lambda _: None
) -> Report:
    """Check this machine for ``config``. Blocks for as long as ``scan`` and the engines do; ``tell`` is told of the latter."""
    return report_of(config, replace(facts_of(config, env, tell), scan=scan()))


def home_report(scan: Callable[[], DeviceScan], env: Mapping[str, str]) -> Report:
    """The report without a configuration: the home profile, neither the current folder nor any daemon."""
    config = Config(base_dir=Path("/"), daemon=DaemonConfig(runtime_dir=Path(os.devnull)))  # it has no directory yet
    engines = EngineProvisioner(config, PortAllocator(config.daemon.engine_ports), run=probing(config))
    found = replace(
        _with_ram(gather(scan(), [("tmp", _temporary())], env=env)), package_problems=tuple(_package_problems(engines))
    )
    return Report(config.profile, check(found, replace(wants_of(config), control_port=None)))


def _package_problems(engines: EngineProvisioner) -> Iterator[tuple[str, str, str]]:
    """Of each installed Python package that carries an engine and cannot run one: its name, why, and the remedy."""
    for name, kind in ENGINES.items():
        if kind.package is not None and package_installed(kind.package):
            pool = PoolConfig(id=name, engine=name, model="file:any", provisioning=ProvisioningConfig(mode="package"))
            for problem in engines.problems(pool, None):
                yield kind.package, problem.message.removeprefix("preload failed: "), problem.hint or ""


def facts_of(config: Config, env: Mapping[str, str], tell: Tell = lambda _: None) -> HostFacts:
    """What this machine is, its GPUs left out, and what is wrong with its pools. Blocks, for a bounded time.

    Where a node runs it knows better which models are loaded already, and has `machine_of` alone.
    """
    setups = setups_of(config, probing(config), tell=tell)
    problems = setups.problems()
    return replace(machine_of(config, env), setup_problems=problems, model_bytes=dict(setups.model_bytes))


def machine_of(config: Config, env: Mapping[str, str]) -> HostFacts:
    """What this machine alone is: all that bars a start. Blocks, for a bounded time."""
    shared, none = _users_of(config)
    return _with_ram(replace(gather(NOT_SCANNED, folders_of(config), env=env), shared_user=shared, no_user=none))


def _users_of(config: Config) -> tuple[str | None, str | None]:
    """Why engines share the daemon's user, and why they can have none."""
    rules = user_rules(config)
    try:
        check_users(rules)
        return shared_user(rules), None
    except PoolError as error:
        return None, error.message


def needs_root(model: Path, runtime_dir: Path) -> str | None:
    """What keeps an unprivileged engine from this interpreter, the package and these two paths; None when nothing does.

    None too when the daemon would not be root: then engines are its own user.
    """
    if os.geteuid() != 0:
        return None
    obstacle = first_obstacle((*interpreter_needs(), Need(str(model), READ), Need(str(runtime_dir), ENTER)), UNPRIVILEGED)
    return None if obstacle is None else str(obstacle)


def report_of(
    config: Config, facts: HostFacts, *, pools: Iterable[str] | None = None, own_ports: frozenset[int] = frozenset()
) -> Report:
    """The report over ``facts`` for ``config``, or for some of its ``pools``.

    ``own_ports`` are held by this daemon and its engines, so they count as free.
    """
    free = replace(facts, ports_taken=facts.ports_taken - own_ports)
    return Report(config.profile, check(free, wants_of(config, pools)))


def scan_once(config: Config | None = None) -> DeviceScan:
    """One look at the GPUs of this machine, or at the simulated ones of the configuration. Blocks. Raises PoolError."""
    config = config or Config()

    async def look(options: WorkerOptions) -> DeviceScan:
        only = restrictions(config.gpu.devices, os.environ.get("CUDA_VISIBLE_DEVICES"))
        monitor = NvmlMonitor(on_incident=lambda incident: None, workers=Workers(options), only=only)
        try:
            return await monitor.scan()
        finally:
            await monitor.close()

    with tempfile.TemporaryDirectory(prefix="pool-managerd-") as scratch:
        return asyncio.run(look(worker_options(config, Path(scratch))))


def worker_options(config: Config, build_dir: Path) -> WorkerOptions:
    """How the NVML worker is to be run: as it is, or on the simulated driver, which is built in ``build_dir`` then.

    Blocks for that. Raises NodeError without a C compiler, SpecError for a topology file that cannot be used.
    """
    topology = config.gpu.simulate
    if topology is None:
        return WorkerOptions()
    library_dir = build_simulated_driver(build_dir)
    check_topology(library_dir, topology)
    environment = simulated_environment(library_dir, topology)
    kernel_log = topology.with_name(topology.name + ".kmsg")
    return WorkerOptions(environment, kernel_log if kernel_log.exists() else Path(os.devnull))


def _with_ram(facts: HostFacts) -> HostFacts:
    """The memory limit of a container counts, too."""
    return replace(facts, ram_available_bytes=available_ram_bytes(), ram_total_bytes=total_ram_bytes())


def wants_of(config: Config, pools: Iterable[str] | None = None) -> Wants:
    """What the configuration asks of the machine; ``pools`` narrows it to these ids."""
    chosen = None if pools is None else frozenset(pools)
    low, _, high = config.daemon.engine_ports.partition("-")
    return Wants(
        profile=config.profile,
        pools=tuple(_pool(pool, config) for pool in config.pools if chosen is None or pool.id in chosen),
        control_port=split_address(config.daemon.bind)[1] or None,
        engine_ports=(int(low), int(high)),
        simulated=config.profile == "dev" and config.gpu.simulate is not None,
        allow=frozenset(config.preflight.allow),
    )


def folders_of(config: Config) -> Iterator[tuple[str, Path]]:
    """Every directory that this configuration makes the daemon or its provisioners write to."""
    yield "runtime", config.daemon.runtime_dir
    yield "state", config.daemon.state_dir
    yield "tmp", _temporary()
    if any(pool.model.partition(":")[0].lower() in FETCHED for pool in config.pools):
        yield "model-cache", config.model_cache
    places: set[tuple[str, Path | None]] = set()
    for given in (pool.provisioning for pool in config.pools):
        places |= {
            ("engine", given.binary.install_dir if given.binary else None),
            ("engine", given.source.build.cache_dir if given.source else None),
        }
    yield from sorted((role, path) for role, path in places if path is not None)


def _pool(pool: PoolConfig, config: Config) -> PoolWants:
    given = pool.provisioning
    cuda, capabilities = _built_for(pool)
    return PoolWants(
        pool.id, mode_of(pool), mask=pool.mask, ports=given.ports, mlock="--mlock" in given.flags,
        engine_cuda=cuda, engine_capabilities=capabilities,
    )  # fmt: skip


def _built_for(pool: PoolConfig) -> tuple[str | None, tuple[str, ...]]:
    """The CUDA version and compute capabilities that the engine is built for, where its image's tag or its build's flags say."""
    given = pool.provisioning
    tag = given.container.tag if given.container is not None else None
    found = _CUDA_TAG.search(tag or "")
    cuda = f"{found['major']}.{found['minor']}" if found else None
    flags = given.source.build.cmake_flags if given.source is not None else ()
    written = next((flag.partition("=")[2] for flag in flags if flag.startswith("-DCMAKE_CUDA_ARCHITECTURES=")), "")
    numbers = [part.partition("-") for part in written.replace(",", ";").split(";") if part.partition("-")[0].isdigit()]
    return cuda, tuple(f"{n[:-1]}.{n[-1]}{'' if kind == 'real' else '+PTX'}" for n, _, kind in numbers if len(n) > 1)


def _temporary() -> Path:
    return Path(tempfile.gettempdir())
