"""Pools: this model, this engine, these GPUs, and where the engine comes from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, JsonValue, field_validator, model_validator

from pool_managerd.config.sections import IdleTtl, PoolReloadConfig
from pool_managerd.config.values import (
    Bytes,
    Devices,
    Digest,
    Digests,
    Engine,
    Mode,
    Port,
    Positive,
    RestartPolicy,
    Section,
    is_pool_id,
)
from pool_managerd.core.gpu.masks import DeviceMask

Alias = Annotated[str, Field(min_length=1, max_length=256)]

DECIDED = frozenset({
    "aliases", "card", "eviction_weight", "id", "idle_ttl_ms", "pinned", "preload", "quant", "reload", "requests",
    "require_same_engine_version", "restart", "sampler_profile_version", "startup_timeout_ms",
})  # fmt: skip
"""The keys of a pool that the daemon alone goes by: an engine that runs is the same with another value of them."""


class SourceBuild(Section):
    """How a source tree is built. Not in force yet."""

    cmake_flags: tuple[str, ...] = Field((), description="Options for CMake.", examples=[["-DGGML_CUDA=ON"]])
    generator: str | None = Field(None, description="CMake's generator.", examples=["Ninja"])
    cache_dir: Path | None = Field(None, description="Where builds are kept.", examples=["/var/cache/pool-managerd"])


class SourceProvisioning(Section):
    """An engine built from its source. Not in force yet."""

    repo: str = Field(description="URL of the repository.", examples=["https://git.example/llama.cpp.git"])
    ref: str = Field(description="Commit, tag or branch.", examples=["b10068"])
    submodules: bool | None = Field(None, description="Fetch submodules, too.", examples=[True])
    build: SourceBuild = SourceBuild()


class ContainerProvisioning(Section):
    """An engine in a container. Not in force yet."""

    image: str = Field(description="Name of the image.", examples=["registry.example/vllm"])
    tag: str | None = Field(None, description="Tag of the image.", examples=["v0.33.0"])
    digest: str | None = Field(None, description="Digest of the image, which wins over the tag.", examples=["sha256:…"])


class PackageProvisioning(Section):
    """The Python package that carries the engine; llama.cpp's xllamacpp needs none of these keys."""

    name: str | None = Field(None, description="Name of the package. Not in force yet.", examples=["xllamacpp"])
    version: str | None = Field(None, description="The version that must be installed. Not in force yet.", examples=["2026.10"])
    repo: str | None = Field(None, description="Where it comes from. Not in force yet.", examples=["https://packages.example"])


class BinaryProvisioning(Section):
    """An engine's own program."""

    path: Path | None = Field(
        None, description="A binary already on this machine; relative to the configuration file.",
        examples=["/opt/llama/llama-server"],
    )  # fmt: skip
    url: str | None = Field(
        None, description="Where to download it. Not in force yet.", examples=["https://builds.example/server"]
    )
    checksum: str | None = Field(None, description="sha256:… of the download. Not in force yet.", examples=["sha256:…"])
    install_dir: Path | None = Field(None, description="Where a download goes. Not in force yet.", examples=["/opt/engines"])


class ModelProvisioning(Section):
    """How the model is verified."""

    ref: str | None = Field(None, description="Instead of the pool's `model`. Not in force yet.", examples=["file:m.gguf"])
    cache_dir: Path | None = Field(
        None,
        description="Downloads are kept in models.cache_dir. Not in force yet.",
        examples=["/var/cache/models"],
    )
    checksum: Digest | Digests | dict[str, Digest] | None = Field(
        None, description="sha256:… of the file; of several files a list in the order of their names, or one by each name.",
        examples=["sha256:…"],
    )  # fmt: skip


class ProvisioningConfig(Section):
    """Where the pool's engine comes from, and what it is told beside what the daemon says itself."""

    mode: Mode | None = Field(
        None, description="package (default of llamacpp), binary, or external: attach to an engine that runs already.",
        examples=["binary"],
    )  # fmt: skip
    url: str | None = Field(
        None, description="Base URL of a running engine, for mode external.", examples=["http://127.0.0.1:8000"]
    )
    allow_package_installs: bool = Field(False, description="Packages may be installed. Not in force yet.")
    allow_binary_downloads: bool = Field(False, description="Binaries may be downloaded. Not in force yet.")
    source: SourceProvisioning | None = Field(
        None, description="From source. Not in force yet.", examples=[{"repo": "…", "ref": "b1"}]
    )
    container: ContainerProvisioning | None = Field(
        None, description="In a container. Not in force yet.", examples=[{"image": "…"}]
    )
    package: PackageProvisioning | None = Field(
        None, description="The Python package that carries the engine.", examples=[{"name": "xllamacpp"}]
    )
    binary: BinaryProvisioning | None = Field(
        None, description="The engine's own program.", examples=[{"path": "/opt/llama/llama-server"}]
    )
    model: ModelProvisioning | None = Field(None, description="How the model is verified.", examples=[{"checksum": "sha256:…"}])
    ports: tuple[Port, ...] = Field(
        (), description="Ports for this pool's engine; where none is free, or absent: daemon.engine_ports.", examples=[[8081]]
    )
    env: dict[str, str] = Field(
        default_factory=dict, description="Environment variables for the engine.", examples=[{"OMP_NUM_THREADS": "4"}]
    )
    flags: tuple[str, ...] = Field(
        (), description="More of the engine's own options, checked against what it lists; what the daemon sets is refused.",
        examples=[["--threads", "4", "--flash-attn", "on"]],
    )  # fmt: skip


Parameters = dict[Annotated[str, Field(min_length=1, max_length=128)], JsonValue]


class RequestRules(Section):
    """What the gateway changes in the bodies of requests (JSON) for this pool, tells their clients, and how many it takes.
    A dot in a key reaches into an object.
    """

    strip: tuple[str, ...] = Field((), description="Keys that are taken out.", examples=[["logprobs"]])
    default: Parameters = Field(default_factory=dict, description="Values where the client says none.", examples=[{"top_k": 40}])
    set: Parameters = Field(
        default_factory=dict, description="Values whatever the client says.",
        examples=[{"chat_template_kwargs.enable_thinking": False}],
    )  # fmt: skip
    by_name: dict[Alias, Parameters] = Field(
        default_factory=dict, description="Further names of the model, and the values that requests under each have.",
        examples=[{"chat-creative": {"temperature": 1.2}}],
    )  # fmt: skip
    agent_friendly: bool = Field(
        False,
        description="Lines that coding agents send anew in each request (the billing marker, tokens left) are left out of system"
        " prompts, so that the engine's prompt cache holds.",
    )
    loading_text: bool | None = Field(None, description="Overrides gateway.loading_text for this pool.", examples=[True])
    concurrency: Positive | None = Field(
        None, description="Requests for it that the gateway has at once, those that wait counted: one more is refused with 429."
        " Absent: as many as may wait.", examples=[8],
    )  # fmt: skip


class ModelCard(Section):
    """How lists of models show it, for people and clients."""

    name: Annotated[str, Field(max_length=256)] | None = Field(
        None, description="A name for people; absent: the name that it is asked by.", examples=["Qwen3 Coder 30B"]
    )
    description: Annotated[str, Field(max_length=4096)] | None = Field(
        None, description="What it is good for.", examples=["Writes code"]
    )
    metadata: Parameters = Field(
        default_factory=dict, description="Whatever clients of yours look for, as `meta.metadata`.", examples=[{"port": 10001}]
    )
    listed: bool = Field(True, description="false: it answers, and is in no list.")


class PoolConfig(Section):
    """One line of intent: this model, this engine, these GPUs."""

    id: str = Field(description="Its name: 1 to 63 letters, digits, `.`, `_` or `-`.", examples=["chat"])
    engine: Engine = Field(description="What serves the model. tgi and triton are attached to only.", examples=["llamacpp"])
    model: str = Field(
        description="`file:` and a path, relative to the configuration file; hf:ORG/REPO/FILE, hf:ORG/REPO:QUANTISATION, https://…,"
        " ollama:NAME, or local:NAME of what was imported; of an external engine any name.",
        examples=["file:models/chat.gguf"],
    )
    quant: str | None = Field(
        None, description="What placement is told of the quantisation, instead of the model header's word.", examples=["Q4_K_M"]
    )
    ctx: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = Field(
        None,
        description="Context in tokens over all slots (one request: ctx / slots); absent: what the model was trained for.",
        examples=[16384],
    )
    slots: Positive = Field(1, description="Requests the engine serves at the same time.")
    devices: Devices = Field(
        (),
        description="GPU indices, GPU0 names, GPU or MIG UUIDs, as a list or as text with commas; empty means all devices.",
        examples=[[0]],
    )
    exclusive: bool = Field(False, description="Share the GPUs with nobody: no other pool, no unmanaged compute process.")
    vram_bytes: Bytes | None = Field(
        None,
        description="VRAM to reserve in total, instead of the estimate: a number, or a size such as 28GiB. vLLM keeps to it.",
        examples=["28GiB"],
    )
    tensor_split: Literal["auto"] | tuple[float, ...] | None = Field(
        None,
        description="Split the model over several GPUs: a share per device of the mask, or auto (of vLLM: tensor parallel).",
        examples=["auto"],
    )
    preload: bool = Field(True, description="Start with the daemon; otherwise on demand.")
    require_same_engine_version: bool = Field(True, description="A reload must keep the engine's version. Not in force yet.")
    sampler_profile_version: str | None = Field(
        None, description="Passed on to placement, for clients that compare it.", examples=["v2"]
    )
    save_slots: bool = Field(
        True,
        description="Keep what an engine has read of its prompts over a stop, where it can (llama.cpp); see `slot_cache`.",
    )
    prime_prompt: Annotated[str, Field(min_length=1, max_length=262_144)] | None = Field(
        None, description="A system prompt that the engine reads before it is ready, so that nobody waits for it.",
        examples=["You are a helpful assistant."],
    )  # fmt: skip
    served_name: str | None = Field(
        None, description="The name that vLLM serves the model under; absent: the pool's id.", examples=["mistral-small"]
    )
    aliases: tuple[Alias, ...] = Field(
        (), description="Further names that requests may call it by (`acquire`).", examples=[["gpt-4o-mini"]]
    )
    card: ModelCard | None = Field(None, description="How lists of models show it.", examples=[{"name": "Qwen3 Coder 30B"}])
    requests: RequestRules | None = Field(
        None, description="What the gateway changes in requests.", examples=[{"set": {"cache_prompt": True}}]
    )
    pinned: bool = Field(False, description="It never goes to make room for another pool, and not for being idle.")
    idle_ttl_ms: IdleTtl | None = Field(None, description="Overrides lifecycle.idle_ttl_ms for this pool.", examples=[600_000])
    eviction_weight: Annotated[float, Field(gt=0, le=1000)] = Field(
        1.0, description="How much its loading time counts when it is decided which pool makes room: 2 keeps it twice as long."
    )
    restart: RestartPolicy | None = Field(None, description="Overrides supervision.restart for this pool.", examples=["always"])
    health_path: Annotated[str, Field(pattern=r"^/")] | None = Field(
        None, description="Path of the health probe, where the engine's own is not /health.", examples=["/v2/health/ready"]
    )
    startup_timeout_ms: Positive | None = Field(
        None, description="Overrides health.startup_timeout_ms for this pool.", examples=[600_000]
    )
    reload: PoolReloadConfig | None = Field(
        None, description="What a reloaded engine must show, where this pool differs.", examples=[{"bake_ms": 60_000}]
    )
    provisioning: ProvisioningConfig = ProvisioningConfig()

    @property
    def other_names(self) -> tuple[str, ...]:
        """What requests may call it by, beside its id and the name that it is served under."""
        return (*self.aliases, *(self.requests.by_name if self.requests is not None else ()))

    @property
    def checksums(self) -> tuple[str, ...]:
        """What the model's files are to be verified against, one digest per file; empty: it is used unverified."""
        given = self.provisioning.model.checksum if self.provisioning.model is not None else None
        if isinstance(given, dict):
            return tuple(given[name] for name in sorted(given))
        return (given,) if isinstance(given, str) else given or ()

    @property
    def mask(self) -> DeviceMask | None:
        """What ``devices`` says; None when all are allowed."""
        return DeviceMask(self.devices) if self.devices else None

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
