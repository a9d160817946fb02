"""The configuration: its schema, by name. Loading one is load.py's."""

from pool_managerd.config.pools import PoolConfig, ProvisioningConfig
from pool_managerd.config.schema import Config, json_schema
from pool_managerd.config.sections import AuthConfig, DaemonConfig, GpuConfig, HealthConfig, PolicyConfig
from pool_managerd.config.values import POOL_ID_PATTERN, Engine, Mode, Profile, Section, is_pool_id, split_address

__all__ = [
    "POOL_ID_PATTERN",
    "AuthConfig",
    "Config",
    "DaemonConfig",
    "Engine",
    "GpuConfig",
    "HealthConfig",
    "Mode",
    "PolicyConfig",
    "PoolConfig",
    "Profile",
    "ProvisioningConfig",
    "Section",
    "is_pool_id",
    "json_schema",
    "split_address",
]
