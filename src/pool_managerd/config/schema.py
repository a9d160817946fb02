"""The whole configuration (DESIGN §7, SPEC §15). Loading a file, the environment and flags into it: config/load.py."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from pool_managerd.config.gateway import GatewayConfig
from pool_managerd.config.model_places import TOOLS
from pool_managerd.config.model_sections import ModelsConfig, PolicyConfig
from pool_managerd.config.pools import PoolConfig
from pool_managerd.config.sections import (
    AuthConfig,
    DaemonConfig,
    GpuConfig,
    HealthConfig,
    LifecycleConfig,
    PreflightConfig,
    QueueConfig,
    ReloadConfig,
    SlotCacheConfig,
    SupervisionConfig,
    TelemetryConfig,
)
from pool_managerd.config.together import TogetherConfig
from pool_managerd.config.values import NOT_IN_FORCE, Profile, Section


class Config(Section):
    """Everything the daemon and the library need to know. Relative paths are resolved by the loader."""

    profile: Profile = Field(
        "home",
        description="home and cloud insist on an NVIDIA GPU, dev may run engines on the CPU; cloud trusts least.",
    )
    daemon: DaemonConfig = DaemonConfig()
    health: HealthConfig = HealthConfig()
    supervision: SupervisionConfig = SupervisionConfig()
    lifecycle: LifecycleConfig = LifecycleConfig()
    queue: QueueConfig = QueueConfig()
    together: TogetherConfig = TogetherConfig()
    gateway: GatewayConfig = GatewayConfig()
    reload: ReloadConfig = ReloadConfig()
    slot_cache: SlotCacheConfig = SlotCacheConfig()
    auth: AuthConfig = AuthConfig()
    models: ModelsConfig = ModelsConfig()
    policy: PolicyConfig = PolicyConfig()
    telemetry: TelemetryConfig = TelemetryConfig()
    gpu: GpuConfig = GpuConfig()
    preflight: PreflightConfig = PreflightConfig()
    pools: tuple[PoolConfig, ...] = Field(
        (), description="What this node serves.", examples=[[{"id": "chat", "engine": "llamacpp", "model": "file:chat.gguf"}]]
    )
    base_dir: Annotated[Path, Field(exclude=True)] = Path()

    def reload_rules(self, pool: PoolConfig | None) -> ReloadConfig:
        """What a reloaded engine of ``pool`` must show; None: of one that is not configured."""
        return self.reload.with_own(None if pool is None else pool.reload)

    @property
    def model_cache(self) -> Path:
        """Where models that were fetched are kept."""
        state = self.daemon.state_dir
        return self.models.cache_dir or state.with_name(f"{state.name}-models")

    @property
    def models_elsewhere(self) -> tuple[str, ...]:
        """Whose models on this machine are used."""
        given = self.models.elsewhere
        return given if given is not None else () if self.profile == "cloud" else TOOLS

    @model_validator(mode="after")
    def _simulate_in_dev_alone(self) -> Config:
        if self.gpu.simulate is not None and self.profile != "dev":
            raise ValueError("cannot simulate GPUs (gpu.simulate) in profile " + self.profile + ": set `profile: dev`")
        return self

    @model_validator(mode="after")
    def _together_names_pools(self) -> Config:
        external = {pool.id for pool in self.pools if pool.provisioning.mode == "external"}
        managed = [pool for pool in self.pools if pool.id not in external]
        self.together.check({pool.id for pool in managed}, external, [pool.id for pool in managed if pool.preload])
        return self

    @model_validator(mode="after")
    def _unique_ids(self) -> Config:
        seen: set[str] = set()
        for pool in self.pools:
            if pool.id in seen:
                raise ValueError(f"duplicate pool id {pool.id!r}: every pool needs its own")
            seen.add(pool.id)
        for pool in self.pools:
            if taken := next((name for name in pool.other_names if name in seen - {pool.id}), None):
                raise ValueError(f"pool {pool.id!r} has the alias {taken!r}, which is another pool's id: leave it out")
        return self


def json_schema() -> dict[str, Any]:
    """The JSON Schema of the configuration file, deterministic (OC-CONFIG-6010)."""
    schema = Config.model_json_schema()
    schema["properties"].pop("base_dir", None)
    return schema


def not_in_force(section: Section, path: str = "") -> Iterator[str]:
    """The paths that are set, in the file or from the environment, and have no effect in this version."""
    for name in sorted(section.model_fields_set):
        value, key = getattr(section, name), f"{path}.{name}" if path else name
        if value is None or value is False or value == ():
            continue  # what is not asked for is not missed
        said = type(section).model_fields[name].description or ""
        if isinstance(value, Section):
            said += type(value).__doc__ or ""
        if NOT_IN_FORCE in said:
            yield key
        elif isinstance(value, Section):
            yield from not_in_force(value, key)
        elif isinstance(value, tuple):
            for index, item in enumerate(value):
                if isinstance(item, Section):
                    yield from not_in_force(item, f"{key}[{index}]")
