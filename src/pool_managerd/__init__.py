"""pool-managerd: this model, this engine, these GPUs, kept healthy.

``async with PoolManager(config) as node:`` is the library's front door; ``pool-managerd serve`` the daemon's.
Names are imported when they are first used, so that the command line starts fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from pool_managerd._version import __version__

if TYPE_CHECKING:
    from pool_managerd.config import Config, PoolConfig
    from pool_managerd.config.load import load_config
    from pool_managerd.core.artifacts import PreparedEngine, ResolvedModel
    from pool_managerd.core.backoff import BackoffPolicy
    from pool_managerd.core.bench import BenchRequest
    from pool_managerd.core.drain import DrainOutcome, DrainRequest
    from pool_managerd.core.event import Event
    from pool_managerd.core.gpu.devices import DeviceSnapshot
    from pool_managerd.core.gpu.masks import DeviceMask
    from pool_managerd.core.gpu.split import SplitPlan
    from pool_managerd.core.health import HealthStatus
    from pool_managerd.core.purge import PurgeRequest
    from pool_managerd.core.registry import PoolSnapshot
    from pool_managerd.core.registry.placement import Decision, PlacementRequest, decide
    from pool_managerd.core.reload import ReloadRequest
    from pool_managerd.embedding import PreloadOutcome, Registry, ReloadOutcome, execute_drain, execute_reload
    from pool_managerd.engines.provisioner import EngineProvisioner
    from pool_managerd.errors import EngineError, NodeError, PoolError, RequestError, SpecError
    from pool_managerd.gateway.embedded import open_gateway
    from pool_managerd.models.provisioner import ModelProvisioner
    from pool_managerd.node import PoolManager
    from pool_managerd.supervision.apply import ApplyOptions
    from pool_managerd.supervision.event_log import Subscription
    from pool_managerd.supervision.operations import Operation
    from pool_managerd.wiring.acquire_calls import AcquiredLease

_HOMES = {
    "config": ("Config", "PoolConfig"),
    "config.load": ("load_config",),
    "core.artifacts": ("PreparedEngine", "ResolvedModel"),
    "core.backoff": ("BackoffPolicy",),
    "core.bench": ("BenchRequest",),
    "core.event": ("Event",),
    "core.gpu.masks": ("DeviceMask",),
    "core.gpu.devices": ("DeviceSnapshot",),
    "core.drain": ("DrainOutcome", "DrainRequest"),
    "core.health": ("HealthStatus",),
    "core.purge": ("PurgeRequest",),
    "core.reload": ("ReloadRequest",),
    "core.gpu.split": ("SplitPlan",),
    "core.registry.placement": ("Decision", "PlacementRequest", "decide"),
    "core.registry": ("PoolSnapshot",),
    "embedding": ("PreloadOutcome", "Registry", "ReloadOutcome", "execute_drain", "execute_reload"),
    "engines.provisioner": ("EngineProvisioner",),
    "errors": ("EngineError", "NodeError", "PoolError", "RequestError", "SpecError"),
    "gateway.embedded": ("open_gateway",),
    "models.provisioner": ("ModelProvisioner",),
    "node": ("PoolManager",),
    "supervision.apply": ("ApplyOptions",),
    "supervision.event_log": ("Subscription",),
    "supervision.operations": ("Operation",),
    "wiring.acquire_calls": ("AcquiredLease",),
}
_WHERE = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "AcquiredLease",
    "ApplyOptions",
    "BackoffPolicy",
    "BenchRequest",
    "Config",
    "Decision",
    "DeviceMask",
    "DeviceSnapshot",
    "DrainOutcome",
    "DrainRequest",
    "EngineError",
    "EngineProvisioner",
    "Event",
    "HealthStatus",
    "ModelProvisioner",
    "NodeError",
    "Operation",
    "PlacementRequest",
    "PoolConfig",
    "PoolError",
    "PoolManager",
    "PoolSnapshot",
    "PreloadOutcome",
    "PreparedEngine",
    "PurgeRequest",
    "Registry",
    "ReloadOutcome",
    "ReloadRequest",
    "RequestError",
    "ResolvedModel",
    "SpecError",
    "SplitPlan",
    "Subscription",
    "__version__",
    "decide",
    "execute_drain",
    "execute_reload",
    "load_config",
    "open_gateway",
]


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562)."""
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)
