"""The configuration schema (DESIGN §7, SPEC §15). Loading a file, the environment and flags into it: config_load.py."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from pool_managerd.core.device_masks import DeviceMask
from pool_managerd.core.narration import parse_size
from pool_managerd.errors import SpecError

POOL_ID_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$"
_POOL_ID = re.compile(POOL_ID_PATTERN)

Engine = Literal["llamacpp", "vllm", "tgi", "triton"]
Mode = Literal["external", "source", "container", "package", "binary"]
Profile = Literal["home", "cloud", "dev"]
RestartPolicy = Literal["on-failure", "always", "never"]
Port = Annotated[int, Field(ge=1, le=65535)]
NonNegative = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]


def _bytes(value: Any) -> Any:
    """A size such as ``28GiB`` as a number; anything else as it is."""
    return parse_size(value) if isinstance(value, str) else value


def is_pool_id(text: str) -> bool:
    """True when ``text`` may name a pool: it becomes part of file names, so nothing but a safe slug passes."""
    return bool(_POOL_ID.fullmatch(text)) and ".." not in text


class Section(BaseModel):
    """A strict, immutable part of the configuration: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class DaemonConfig(Section):
    bind: str = Field("127.0.0.1:9200", description="Address of the control API. Off loopback a token is required.")
    runtime_dir: Path = Field(Path(".runtime"), description="Pid files, handoff files, engine logs.")
    state_dir: Path = Field(Path(".state"), description="What must survive a restart of the daemon.")
    metrics_bind: str | None = Field(None, description="A second address that serves /metrics alone.")
    preload_parallelism: Positive = Field(1, description="How many pools may load at the same time.")
    on_exit: Literal["stop", "leave"] = Field("stop", description="What a clean exit does with running engines.")
    engine_ports: str = Field("8080-8999", description="Range that engine ports are taken from.")
    engine_user: str | None = Field(None, description="User that engines run as when the daemon is root (default: nobody).")

    @field_validator("engine_ports")
    @classmethod
    def _range(cls, value: str) -> str:
        low, dash, high = value.partition("-")
        if not (dash and low.isdigit() and high.isdigit() and 1 <= int(low) <= int(high) <= 65535):
            raise ValueError("must look like 8080-8999")
        return value

    @field_validator("bind", "metrics_bind")
    @classmethod
    def _address(cls, value: str | None) -> str | None:
        if value is not None:
            split_address(value)
        return value


class HealthConfig(Section):
    startup_timeout_ms: Positive = Field(120_000, description="How long an engine may take until its first good probe.")
    interval_ms: Positive = Field(500, description="Longest gap between probes while starting; the first ones come faster.")
    probe_interval_ms: Positive = Field(5_000, description="Gap between probes of a ready engine.")
    probe_timeout_ms: Positive = Field(2_000, description="Total time one probe may take.")
    failure_threshold: Positive = Field(3, description="Misses in a row that make a ready engine unhealthy.")


class BackoffConfig(Section):
    initial_ms: NonNegative = 1_000
    max_ms: NonNegative = 60_000
    factor: Annotated[float, Field(ge=1, le=10)] = 2
    jitter: Annotated[float, Field(ge=0, le=1)] = 0.1
    min_delay_ms: NonNegative = 500
    cuda_multiplier: Annotated[float, Field(ge=1, le=100)] = 2
    reset_after_ms: NonNegative = 300_000


class BreakerConfig(Section):
    threshold: Positive = 5
    open_ms: Positive = 300_000
    close_after_ms: NonNegative = 60_000


class RestartLimitConfig(Section):
    max_restarts: Positive = 10
    window_ms: Positive = 60_000
    storm_warn: Positive = 5
    storm_open: Positive = 10
    storm_window_ms: Positive = 30_000
    reset_after_ms: NonNegative = 600_000


class SupervisionConfig(Section):
    stop_grace_ms: NonNegative = Field(5_000, description="Between SIGTERM and SIGKILL.")
    restart: RestartPolicy = Field("on-failure", description="on-failure: exit 0 is graceful and not restarted.")
    backoff: BackoffConfig = BackoffConfig()
    breaker: BreakerConfig = BreakerConfig()
    restart_limit: RestartLimitConfig = RestartLimitConfig()


class LifecycleConfig(Section):
    drain_deadline_ms: Annotated[int, Field(ge=0, le=86_400_000)] = 30_000
    warmup: Literal["before_ready", "after_ready", "off"] = "before_ready"


class AuthConfig(Section):
    token_file: Path | None = Field(None, description="File whose first line is the bearer token.")


class PolicyConfig(Section):
    allow_network: bool = False
    allow_schemes: tuple[str, ...] = ("file",)
    allow_domains: tuple[str, ...] = ()
    engine_allowlist: tuple[str, ...] = Field(
        (), description="Binaries that may be submitted in cloud. An interpreter (python3, bash) on it allows everything."
    )
    engine_env: tuple[str, ...] = Field(
        (), description="More environment variables that a submitted engine may have in cloud, beside the harmless ones."
    )


class GpuConfig(Section):
    rescan_interval_ms: Annotated[int, Field(ge=1_000, le=60_000)] = Field(
        10_000, description="How often the GPUs are looked at; also at once after an engine starts or stops."
    )
    fit: Literal["enforce", "warn", "off"] = Field(
        "enforce", description="enforce: no start without room in VRAM; warn: start and say so; off: no estimate at all."
    )
    overhead_mib: Annotated[int, Field(ge=0, le=1_048_576)] = Field(
        512, description="Per GPU, for the engine's CUDA context and buffers of its libraries."
    )
    vram_wait_ms: Annotated[int, Field(ge=1, le=3_600_000)] = Field(
        30_000, description="How long after a stop the memory may take to be seen free."
    )
    simulate: Path | None = Field(None, description="Topology file of simulated GPUs; profile dev only.")


class PreflightConfig(Section):
    allow: tuple[Annotated[str, Field(pattern=r"^[a-z_]+(:.+)?$")], ...] = Field(
        (),
        description="Findings that may fail, as `code` or `code:subject`; each use is recorded. None that every start needs.",
    )

    @field_validator("allow")
    @classmethod
    def _gpus_are_required(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for code in (item.partition(":")[0] for item in value):
            if code == "gpu_required":
                raise ValueError("gpu_required cannot be allowed to fail: only `profile: dev` runs engines without a GPU")
            if code in ("device_mask", "pool_setup", "no_driver", "driver_mismatch") or code.startswith("nvml_"):
                raise ValueError(f"{code} cannot be allowed to fail: no start is possible then")
        return value


class TelemetryConfig(Section):
    labels: dict[str, str] = Field(default_factory=dict, description="Constant labels on every series and log line.")
    log_format: Literal["auto", "json", "pretty"] = "auto"


class SourceBuild(Section):
    cmake_flags: tuple[str, ...] = ()
    generator: str | None = None
    cache_dir: Path | None = None


class SourceProvisioning(Section):
    repo: str
    ref: str
    submodules: bool | None = None
    build: SourceBuild = SourceBuild()


class ContainerProvisioning(Section):
    image: str
    tag: str | None = None
    digest: str | None = None


class PackageProvisioning(Section):
    name: str | None = None
    version: str | None = None
    repo: str | None = None


class BinaryProvisioning(Section):
    path: Path | None = Field(None, description="A binary already on this machine; relative to the configuration file.")
    url: str | None = None
    checksum: str | None = None
    install_dir: Path | None = None


class ModelProvisioning(Section):
    ref: str | None = None
    cache_dir: Path | None = None
    checksum: Annotated[str, Field(pattern=r"^sha256:[0-9a-fA-F]{64}$")] | None = None


class ProvisioningConfig(Section):
    mode: Mode | None = None
    url: str | None = Field(None, description="Base URL of a running engine, for mode external.")
    allow_package_installs: bool = False
    allow_binary_downloads: bool = False
    source: SourceProvisioning | None = None
    container: ContainerProvisioning | None = None
    package: PackageProvisioning | None = None
    binary: BinaryProvisioning | None = None
    model: ModelProvisioning | None = None
    ports: tuple[Port, ...] = ()
    env: dict[str, str] = Field(default_factory=dict)
    flags: tuple[str, ...] = ()


class PoolConfig(Section):
    """One line of intent: this model, this engine, these GPUs."""

    id: str
    engine: Engine
    model: str
    quant: str | None = None
    ctx: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = Field(
        None,
        description="Context in tokens over all slots (one request: ctx / slots); absent: what the model was trained for.",
    )
    slots: Positive = Field(1, description="Requests the engine serves at the same time.")
    devices: tuple[NonNegative | str, ...] = Field(
        (),
        description="GPU indices, GPU0 names, GPU or MIG UUIDs, as a list or as text with commas; empty means all devices.",
    )
    exclusive: bool = Field(False, description="Share the GPUs with nobody: no other pool, no foreign compute process.")
    vram_bytes: Annotated[Positive, BeforeValidator(_bytes, json_schema_input_type=int | str)] | None = Field(
        None,
        description="VRAM to reserve in total, instead of the estimate: a number, or a size such as 28GiB. vLLM keeps to it.",
    )
    tensor_split: Literal["auto"] | tuple[float, ...] | None = Field(
        None,
        description="Split the model over several GPUs: a share per device of the mask, or auto (of vLLM: tensor parallel).",
    )
    preload: bool = Field(True, description="Start with the daemon; otherwise on demand.")
    require_same_engine_version: bool = True
    sampler_profile_version: str | None = None
    served_name: str | None = None
    restart: RestartPolicy | None = Field(None, description="Overrides supervision.restart for this pool.")
    health_path: Annotated[str, Field(pattern=r"^/")] | None = None
    startup_timeout_ms: Positive | None = Field(None, description="Overrides health.startup_timeout_ms for this pool.")
    provisioning: ProvisioningConfig = ProvisioningConfig()

    @property
    def mask(self) -> DeviceMask | None:
        """What ``devices`` says; None when all are allowed."""
        return DeviceMask(self.devices) if self.devices else None

    @field_validator("devices", mode="before")
    @classmethod
    def _mask(cls, value: Any) -> Any:
        """A text with commas is a list; what it means is checked here, what exists only when the pool starts."""
        if value is None or value in ([], ()):
            return ()
        if isinstance(value, str | list | tuple | int) and not isinstance(value, bool):
            try:
                return DeviceMask.parse(",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)).items
            except SpecError as error:
                raise ValueError(error.message.rpartition("': ")[2]) from error
        return value

    @model_validator(mode="after")
    def _one_instance_at_most(self) -> PoolConfig:
        if sum(isinstance(item, str) and item.upper().startswith("MIG-") for item in self.devices) > 1:
            raise ValueError("devices names several MIG instances, which cannot share a model: name one, or whole GPUs")
        return self

    @model_validator(mode="after")
    def _one_share_per_device(self) -> PoolConfig:
        shares = self.tensor_split
        if isinstance(shares, tuple):
            if self.devices and len(shares) != len(self.devices):
                raise ValueError(f"tensor_split has {len(shares)} shares for {len(self.devices)} devices: give one share each")
            if not shares or not all(0 < share < float("inf") for share in shares):
                raise ValueError("tensor_split must have a share above 0 for every device; leave unused devices out")
        return self

    @field_validator("id")
    @classmethod
    def _slug(cls, value: str) -> str:
        if not is_pool_id(value):
            raise ValueError("must be 1 to 63 letters, digits, '.', '_' or '-', starting with a letter or digit, without '..'")
        return value


class Config(Section):
    """Everything the daemon and the library need to know. Relative paths are resolved by the loader."""

    profile: Profile = "home"
    daemon: DaemonConfig = DaemonConfig()
    health: HealthConfig = HealthConfig()
    supervision: SupervisionConfig = SupervisionConfig()
    lifecycle: LifecycleConfig = LifecycleConfig()
    auth: AuthConfig = AuthConfig()
    policy: PolicyConfig = PolicyConfig()
    telemetry: TelemetryConfig = TelemetryConfig()
    gpu: GpuConfig = GpuConfig()
    preflight: PreflightConfig = PreflightConfig()
    pools: tuple[PoolConfig, ...] = ()
    base_dir: Annotated[Path, Field(exclude=True)] = Path()

    @model_validator(mode="after")
    def _simulate_in_dev_alone(self) -> Config:
        if self.gpu.simulate is not None and self.profile != "dev":
            raise ValueError("cannot simulate GPUs (gpu.simulate) in profile " + self.profile + ": set `profile: dev`")
        return self

    @model_validator(mode="after")
    def _unique_ids(self) -> Config:
        seen: set[str] = set()
        for pool in self.pools:
            if pool.id in seen:
                raise ValueError(f"duplicate pool id {pool.id!r}: every pool needs its own")
            seen.add(pool.id)
        return self


def split_address(text: str) -> tuple[str, int]:
    """``host:port`` or ``[v6]:port`` as a pair. Raises ValueError with the remedy."""
    host, colon, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise ValueError(f"{text!r} is not HOST:PORT; write an IPv6 address in brackets, as [::1]:9200")
    if not (colon and host and port.isdigit() and int(port) <= 65535):
        raise ValueError(f"{text!r} is not HOST:PORT, as 127.0.0.1:9200")
    return host, int(port)


def json_schema() -> dict[str, Any]:
    """The JSON Schema of the configuration file, deterministic (OC-CONFIG-6010)."""
    schema = Config.model_json_schema()
    schema["properties"].pop("base_dir", None)
    return schema
