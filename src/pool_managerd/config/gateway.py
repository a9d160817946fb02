"""The section of the gateway."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from pool_managerd.config.values import Address, Bytes, Section

CaptureBytes = Annotated[Bytes, Field(ge=1 << 20)]
HeaderName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]


class GatewayConfig(Section):
    """The front door: clients ask for models by name on one port, in the dialects of OpenAI and Anthropic."""

    bind: Address | None = Field(
        None, description="Where it listens, as a process of its own that `serve` keeps running; absent: there is none.",
        examples=["127.0.0.1:8088"],
    )  # fmt: skip
    workers: Annotated[int, Field(ge=1, le=64)] = Field(
        1, description="How many processes it is: one serves some thousand events of streams a second, on a core of its own."
    )
    keys_file: Path | None = Field(
        None, description="API keys, written by `keys add`. Off loopback they are required.", examples=["keys.json"]
    )
    tls_cert: Path | None = Field(
        None, description="Certificate in PEM, with those that lead to its root behind it: clients come by https alone."
        " A changed file is seen.", examples=["gateway.crt"],
    )  # fmt: skip
    tls_key: Path | None = Field(
        None, description="Its private key, in PEM, which other users may not read.", examples=["gateway.key"]
    )
    cors_origins: tuple[str, ...] = Field(
        (), description="Web pages that may call it, as https://chat.example.", examples=[["https://chat.example"]]
    )
    heartbeat_ms: Annotated[int, Field(ge=1000, le=600_000)] = Field(
        12_000, description="How often a stream that waits (for a slot, a load, a prompt) shows a sign of life."
    )
    max_body_bytes: Bytes = Field(64 << 20, description="The largest request body: a number, or a size such as 64MiB.")
    linger_ms: Annotated[int, Field(ge=0, le=60_000)] = Field(
        2_000, description="How long a lease is kept for the next request, unless somebody waits for it."
    )
    loading_text: bool = Field(
        False,
        description="Streams of `/v1/chat/completions` that wait tell what for, as reasoning of the model, which chat clients"
        " show; `pools[].requests.loading_text` overrides it.",
    )
    capture_bytes: CaptureBytes | Literal[0] = Field(
        0, description="Memory for what the last requests and their answers say: a number, or a size such as 64MiB, 1MiB at"
        " least. `requests ID` shows it. 0: it is kept nowhere.",
    )  # fmt: skip
    session_headers: tuple[HeaderName, ...] = Field(
        (
            "x-session-id", "x-session-affinity", "x-claude-code-session-id", "session-id", "session_id", "x-litellm-session-id",
            "x-openwebui-chat-id",
        ),
        description="Headers that name a session; then `prompt_cache_key` in the body. Of pools that share a name, the one that"
        " served a session last serves it again, if it can at once. Empty: no sessions.",
    )  # fmt: skip

    @model_validator(mode="after")
    def _certificate_with_its_key(self) -> GatewayConfig:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key belong together: give both, or none")
        return self
