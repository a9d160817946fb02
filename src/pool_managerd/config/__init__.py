"""The configuration: its schema, by name, loaded when it is first used. Loading a file is load.py's, reading one parse.py's."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pool_managerd.config.model_sections import PolicyConfig
    from pool_managerd.config.pools import PoolConfig, ProvisioningConfig
    from pool_managerd.config.schema import Config, json_schema
    from pool_managerd.config.sections import AuthConfig, DaemonConfig, GpuConfig, HealthConfig
    from pool_managerd.config.values import POOL_ID_PATTERN, Engine, Mode, Profile, Section, is_pool_id, path_from, split_address

__all__ = [
    "POOL_ID_PATTERN", "AuthConfig", "Config", "DaemonConfig", "Engine", "GpuConfig", "HealthConfig", "Mode", "PolicyConfig",
    "PoolConfig", "Profile", "ProvisioningConfig", "Section", "is_pool_id", "json_schema", "path_from",
    "split_address",
]  # fmt: skip
_HOMES = ("values", "sections", "model_sections", "pools", "schema")


def __getattr__(name: str) -> Any:
    """Import a name on first use (PEP 562): a command that asks a daemon reads a file without the schema of all."""
    if name in __all__:
        for home in _HOMES:
            found = vars(import_module(f"{__name__}.{home}"))
            if name in found:
                return globals().setdefault(name, found[name])
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
