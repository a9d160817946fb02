"""What a machine is, and what is wanted of it: frozen values, absent facts None."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from pool_managerd.core.gpu.devices import NOT_SCANNED, DeviceScan, DeviceSnapshot
from pool_managerd.core.gpu.masks import DeviceMask

CUDA_TOOLS = ("nvidia-smi", "nvcc")


@dataclass(frozen=True, slots=True)
class Folder:
    """A directory that is written to. ``role``: runtime, state, model-cache, engine or tmp. ``problem``: why it cannot be."""

    role: str
    path: str
    free_bytes: int | None = None
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class HostFacts:
    """This machine, as far as it could be read.

    ``tools`` maps a program's name to its path. ``device_nodes`` and ``cdi_files`` name what exists of
    NVIDIA's device files and container descriptions. Limits are the soft ones; None is unlimited.
    ``fabric_manager`` is None where its process could not be seen from here, as in a container. ``setup_problems`` are pools
    whose model or engine cannot be used as configured: id, message and remedy. ``package_problems`` are
    Python packages that carry an engine and cannot be loaded: name, message and remedy. ``model_bytes``: sizes of models by
    pool, where they are known and not loaded yet.
    """

    tools: Mapping[str, str] = field(default_factory=dict)
    scan: DeviceScan = NOT_SCANNED
    device_nodes: frozenset[str] = frozenset()
    fabric_manager: bool | None = None
    cdi_files: tuple[str, ...] = ()
    memlock_bytes: int | None = None
    open_files: int | None = None
    shm_total_bytes: int | None = None
    ram_total_bytes: int | None = None
    ram_available_bytes: int | None = None
    folders: tuple[Folder, ...] = ()
    ports_taken: frozenset[int] = frozenset()
    as_root: bool = False
    shared_user: str | None = None
    no_user: str | None = None
    setup_problems: tuple[tuple[str, str, str], ...] = ()
    package_problems: tuple[tuple[str, str, str], ...] = ()
    model_bytes: Mapping[str, int] = field(default_factory=dict)

    @property
    def cuda_tool(self) -> str | None:
        """``nvcc`` or ``nvidia-smi``, whichever is found (B-PREFLIGHT-001..004)."""
        return next((tool for tool in CUDA_TOOLS if tool in self.tools), None)

    @property
    def gpus(self) -> tuple[DeviceSnapshot, ...]:
        """The whole GPUs."""
        return tuple(device for device in self.scan.devices if device.parent_uuid is None)


@dataclass(frozen=True, slots=True)
class PoolWants:
    """What one pool needs. ``engine_cuda`` and ``engine_capabilities``: what its build was made with, where known."""

    pool_id: str
    mode: str = "package"
    mask: DeviceMask | None = None
    ports: tuple[int, ...] = ()
    mlock: bool = False
    engine_cuda: str | None = None
    engine_capabilities: tuple[str, ...] = ()

    @property
    def runs_here(self) -> bool:
        """False for an engine that somebody else runs."""
        return self.mode != "external"


@dataclass(frozen=True, slots=True)
class Wants:
    """What this machine is checked for. ``allow``: codes, or ``code:subject``, of findings that may fail."""

    profile: str = "home"
    pools: tuple[PoolWants, ...] = ()
    control_port: int | None = None
    engine_ports: tuple[int, int] | None = None
    simulated: bool = False
    allow: frozenset[str] = frozenset()

    @property
    def gpu_only(self) -> bool:
        return self.profile != "dev"

    @property
    def local_pools(self) -> tuple[PoolWants, ...]:
        return tuple(pool for pool in self.pools if pool.runs_here)
