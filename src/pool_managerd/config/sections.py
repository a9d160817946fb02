"""The sections of the configuration that are not pools. Every key says what it means, and has an example where its default
is none: the reference page is made from here.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from pool_managerd.config.values import Address, Bytes, Devices, NonNegative, Positive, RestartPolicy, Section, split_address
from pool_managerd.core.crash import CrashClass


class DaemonConfig(Section):
    """Where the daemon listens and keeps its files, and as whom it runs engines."""

    bind: Address = Field("127.0.0.1:9200", description="Address of the control API. Off loopback a token is required.")
    runtime_dir: Path = Field(Path(".runtime"), description="Pid files, handoff files, engine logs.")
    state_dir: Path = Field(Path(".state"), description="What must survive a restart of the daemon.")
    metrics_bind: Address | None = Field(
        None, description="A second address that serves /metrics alone.", examples=["127.0.0.1:9201"]
    )
    preload_parallelism: Positive = Field(1, description="How many pools may load at the same time at boot.")
    on_exit: Literal["stop", "leave"] = Field(
        "stop", description="What a clean exit does with engines; `leave` them running for the next daemon, as for an upgrade."
    )
    engine_ports: str = Field("8080-8999", description="Range that engine ports are taken from.")
    engine_user: str | None = Field(
        None, description="As root: one user for all engines. `root` isolates nothing.", examples=["llm"]
    )
    engine_uids: str = Field("61184-65519", description="As root: range of the uids that engines have, one per pool.")
    engine_groups: tuple[str, ...] = Field(
        (), description="As root: more groups for engines, such as one that reads models.", examples=[["models"]]
    )

    @field_validator("engine_ports", "engine_uids")
    @classmethod
    def _range(cls, value: str, info: ValidationInfo) -> str:
        low, dash, high = value.partition("-")
        highest, example = (65535, "8080-8999") if info.field_name == "engine_ports" else (0xFFFFFFFD, "61184-65519")
        if dash and low.isdecimal() and high.isdecimal() and 1 <= int(low) <= int(high) <= highest:
            return value
        raise ValueError(f"must look like {example}")

    @model_validator(mode="after")
    def _each_its_own(self) -> DaemonConfig:
        if os.path.normpath(self.runtime_dir) == os.path.normpath(self.state_dir):
            raise ValueError("runtime_dir and state_dir are the same directory: each needs its own")
        if self.metrics_bind == self.bind and split_address(self.bind)[1]:
            raise ValueError("metrics_bind is the control API's own address, which serves /metrics, too: leave it out")
        return self


class HealthConfig(Section):
    """How an engine is asked whether it is healthy."""

    startup_timeout_ms: Positive = Field(
        120_000,
        description="How long a load may stand still: while it reads or logs, it goes on. Absent: longer for vLLM, TGI, Triton.",
    )
    startup_cap_ms: NonNegative = Field(3_600_000, description="The longest that a load may take, however it moves; 0: any time.")
    interval_ms: Positive = Field(500, description="Longest gap between probes while starting; the first ones come faster.")
    probe_interval_ms: Positive = Field(5_000, description="Gap between probes of a ready engine.")
    probe_timeout_ms: Positive = Field(2_000, description="Total time one probe may take.")
    failure_threshold: Positive = Field(
        3,
        description="Failed probes in a row that make a ready engine unhealthy; one that works and is silent is only not ready.",
    )
    stall_ms: Positive = Field(60_000, description="Requests that see no token and no CPU time for so long: the engine is hung.")
    busy_limit_ms: Positive = Field(
        600_000, description="So long is an engine believed to work that uses the CPU, and gives no token or answers no probe."
    )


class BackoffConfig(Section):
    """How long to wait before an engine that failed is started again: initial × factorⁿ, never above max."""

    initial_ms: NonNegative = Field(1_000, description="Wait after the first failure; 0 starts again at once.")
    max_ms: NonNegative = Field(60_000, description="The longest wait.")
    factor: Annotated[float, Field(ge=1, le=10)] = Field(2, description="How much longer each wait is than the one before.")
    jitter: Annotated[float, Field(ge=0, le=1)] = Field(
        0.1, description="Share by which a wait is made longer or shorter, so that many pools do not start in step."
    )
    min_delay_ms: NonNegative = Field(500, description="The shortest wait, jitter included.")
    cuda_multiplier: Annotated[float, Field(ge=1, le=100)] = Field(2, description="How much longer waits are after a CUDA error.")
    multipliers: dict[CrashClass, Annotated[float, Field(ge=1, le=100)]] = Field(
        default_factory=dict, description="How much longer waits are after other classes of crashes.", examples=[{"vram_oom": 2}]
    )
    reset_after_ms: NonNegative = Field(300_000, description="After being ready this long the first wait holds again.")


class BreakerConfig(Section):
    """When an engine that keeps failing is left alone for a while. CUDA errors have a breaker of their own."""

    threshold: Positive = Field(5, description="Failures in a row that open it.")
    open_ms: Positive = Field(300_000, description="How long until one start is tried; twice as long each time that fails.")
    close_after_ms: NonNegative = Field(60_000, description="How long an engine must be ready until it closes and counts anew.")


class RestartLimitConfig(Section):
    """A limit on restarts in a time."""

    max_restarts: Positive = Field(10, description="Restarts in `window_ms`, no more: the next one waits.")
    window_ms: Positive = Field(60_000, description="The time that they are counted in.")
    storm_warn: Positive = Field(5, description="More restarts than this in `window_ms` are told as a storm.")
    storm_open: Positive = Field(10, description="Restarts in `storm_window_ms` that open the breaker.")
    storm_window_ms: Positive = Field(30_000, description="The time that a storm is counted in.")
    reset_after_ms: NonNegative = Field(600_000, description="After being ready this long those restarts are forgotten.")


class SupervisionConfig(Section):
    """What happens when engines end, and how they are stopped."""

    stop_grace_ms: NonNegative = Field(5_000, description="Between SIGTERM and SIGKILL.")
    restart: RestartPolicy = Field(
        "on-failure", description="A server that ends unasked has failed; a submitted engine's exit 0 is graceful (on-failure)."
    )
    backoff: BackoffConfig = BackoffConfig()
    breaker: BreakerConfig = BreakerConfig()
    restart_limit: RestartLimitConfig = RestartLimitConfig()


IdleTtl = Annotated[int, Field(ge=0, le=30 * 86_400_000)]


class LifecycleConfig(Section):
    """Draining and warming up."""

    drain_deadline_ms: Annotated[int, Field(ge=0, le=86_400_000)] = Field(
        30_000, description="How long a drain waits for leases before it cuts them off, where the request does not say."
    )
    warmup: Literal["before_ready", "after_ready", "off"] = Field(
        "before_ready", description="When an engine answers its first prompt, which measures it; a failed one only warns."
    )
    idle_ttl_ms: IdleTtl = Field(
        0, description="An engine that was asked for nothing for so long is stopped, until somebody asks again. 0: never."
    )


class QueueConfig(Section):
    """Requests that wait for a slot (`acquire`): how many, for how long, and who goes first."""

    max_waiting: Positive = Field(2048, description="Requests that may wait on this node; the next one is refused (429).")
    max_waiting_per_pool: Positive = Field(512, description="Requests that may wait for one pool.")
    wait_ms: Annotated[int, Field(ge=0, le=86_400_000)] = Field(
        300_000, description="How long a request waits that does not say (`wait_ms`), loading included."
    )
    starving_ms: Annotated[int, Field(ge=0, le=86_400_000)] = Field(
        30_000,
        description="A request whose model is not loaded and that has waited so long keeps new requests from those models that"
        " must go for it.",
    )
    residency_ms: Annotated[int, Field(ge=0, le=86_400_000)] = Field(
        0, description="A model that was just loaded stays for so long before another one takes its place, unless that starves."
    )


SmokePrompt = Annotated[str, Field(min_length=1, max_length=4096)]
SmokeExpect = Annotated[str, Field(min_length=1, max_length=256)]
BaselineShare = Annotated[float, Field(ge=0, le=1)]
BakeMs = Annotated[int, Field(ge=0, le=3_600_000)]


class PoolReloadConfig(Section):
    """Overrides `reload` for this pool, key by key; a prompt of its own comes with an expectation of its own, or with none."""

    smoke_prompt: SmokePrompt | None = Field(
        None, description="Overrides reload.smoke_prompt, and smoke_expect with it.", examples=["Translate to French: cat"]
    )
    smoke_expect: SmokeExpect | None = Field(None, description="Overrides reload.smoke_expect.", examples=["chat"])
    baseline_share: BaselineShare | None = Field(None, description="Overrides reload.baseline_share.", examples=[0.9])
    bake_ms: BakeMs | None = Field(None, description="Overrides reload.bake_ms.", examples=[60_000])


class ReloadConfig(Section):
    """What a reloaded engine must show before it stays: else the one before it runs again. Pools may override it."""

    smoke_prompt: SmokePrompt | None = Field(
        None, description="Asked of a new engine that serves completions; it must answer.", examples=["What is 2 + 2?"]
    )
    smoke_expect: SmokeExpect | None = Field(
        None, description="What its answer must contain, upper and lower case alike; absent: any text.", examples=["4"]
    )
    baseline_share: BaselineShare = Field(
        0.7, description="Share of the rate measured before, for the same engine version, model and GPUs, that it must reach."
    )
    bake_ms: BakeMs = Field(5_000, description="How long it must stay ready.")

    def with_own(self, own: PoolReloadConfig | None) -> ReloadConfig:
        """As it holds for a pool with ``own`` rules."""
        if own is None:
            return self
        given = {key: value for key, value in own.model_dump().items() if value is not None}
        if "smoke_prompt" in given:
            given.setdefault("smoke_expect", None)
        return self.model_copy(update=given)


class SlotCacheConfig(Section):
    """Prompts that engines have read, kept on disk while an engine is down: they hold what was said, as a prompt does."""

    disk_bytes: Bytes | Literal[0] = Field(
        8 << 30, description="All pools together, a number or a size such as 8GiB; the oldest make room. 0: nothing is saved."
    )
    min_tokens: Positive = Field(256, description="A slot with fewer tokens than this is not worth a file.")
    save_timeout_ms: Annotated[int, Field(ge=1, le=600_000)] = Field(
        20_000, description="How long a planned stop may wait for its slots to be saved; then it stops all the same."
    )
    restore_timeout_ms: Annotated[int, Field(ge=1, le=3_600_000)] = Field(
        60_000, description="How long a start may take to restore slots, or to read `pools[].prime_prompt`, before it is ready."
    )


class AuthConfig(Section):
    """Who may use the control API."""

    token_file: Path | None = Field(
        None, description="File whose first line is the bearer token (32 characters at least).", examples=["token"]
    )


class GpuConfig(Section):
    """Which GPUs are used, and how their memory is reserved."""

    devices: Devices = Field(
        (), description="GPUs that this node may use at all, as a pool's devices; empty: all. Indices stay the machine's.",
        examples=[[0, 1]],
    )  # fmt: skip
    rescan_interval_ms: Annotated[int, Field(ge=1_000, le=60_000)] = Field(
        10_000, description="How often the GPUs are scanned; also at once after an engine starts or stops."
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
    keep_free_mib: Annotated[int, Field(ge=0, le=1_048_576)] = Field(
        0, description="Of every GPU, free for others whatever they hold already: idle pools go when there is less."
    )
    yield_to: tuple[Annotated[str, Field(min_length=1, max_length=64)], ...] = Field(
        (), description="Programs that a GPU is left to while they run on it, by name; `*` stands for anything.",
        examples=[["blender", "comfyui*"]],
    )  # fmt: skip
    simulate: Path | None = Field(
        None, description="Topology file of simulated GPUs; profile dev only.", examples=["two-gpus.txt"]
    )


class PreflightConfig(Section):
    """Which findings about the machine may be overridden."""

    allow: tuple[Annotated[str, Field(pattern=r"^[a-z_]+(:.+)?$")], ...] = Field(
        (),
        description="Findings that may fail, as `code` or `code:subject`; each use is recorded. None that every start needs.",
        examples=[["memlock"]],
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
    """Logs and metrics."""

    labels: dict[str, str] = Field(
        default_factory=dict, description="Constant labels on every series and log line.", examples=[{"node_id": "gpu-7"}]
    )
    log_level: Literal["debug", "info", "warn", "error"] = Field("info", description="Log lines below this are left out.")
    log_format: Literal["auto", "json", "pretty"] = Field(
        "auto", description="auto: readable on a terminal, JSON Lines elsewhere."
    )
