"""The sections about models: where they may come from, and where they are kept."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from pool_managerd.config.model_places import ModelPlaces
from pool_managerd.config.values import Bytes, Section

Domain = Annotated[str, Field(pattern=r"^(\*\.)?[A-Za-z0-9_.:-]{1,253}$")]


class PolicyConfig(Section):
    """What may be fetched and run."""

    allow_network: bool = Field(False, description="Models may be fetched from the network.")
    allow_schemes: tuple[str, ...] = Field(
        ("file",), description="Schemes that models may have: file, hf, https, oci, s3, and http, which nobody should need."
    )
    allow_domains: tuple[Domain, ...] = Field(
        (),
        description="Hosts that models may come from, redirects included; `*.` stands for all below. Empty: all with a public"
        " address. A host that is named here may have any address.",
        examples=[["huggingface.co", "*.hf.co"]],
    )
    allow_pickle: bool = Field(
        False, description="Repositories may be fetched whose weights are pickles (*.bin, *.pt): loading one runs what is in it."
    )
    allow_remote_code: bool = Field(
        False, description="Repositories may be fetched that bring code of their own, and engines be told to run it."
    )
    strict_verification: bool = Field(
        False, description="No model is used without a digest to compare it with: the hub's, or provisioning.model.checksum."
    )
    engine_allowlist: tuple[str, ...] = Field(
        (), description="Binaries that may be submitted in cloud. An interpreter (python3, bash) on it allows everything.",
        examples=[["/opt/llama/llama-server"]],
    )  # fmt: skip
    engine_env: tuple[str, ...] = Field(
        (), description="More environment variables that a submitted engine may have in cloud, beside the harmless ones.",
        examples=[["HF_HOME"]],
    )  # fmt: skip


class ModelGcConfig(Section):
    """When models in the cache are deleted that nobody needs any more. Pinned ones never are."""

    enabled: bool = Field(False, description="Delete them where models.max_bytes or models.keep_free_bytes would not hold.")
    keep_days: Annotated[int, Field(ge=0, le=3650)] = Field(
        7, description="What somebody has needed within so many days stays; so long are parts of downloads kept, too."
    )


class ModelsConfig(Section):
    """Where models that were fetched are kept."""

    cache_dir: Path | None = Field(
        None,
        description="Directory for models that are fetched; engines read them there. Absent: beside daemon.state_dir, with"
        " `-models` behind its name.",
        examples=["/var/cache/pool-managerd/models"],
    )
    keep_free_bytes: Bytes | Literal[0] = Field(
        4 << 30, description="Of the disk it is on, left free: a number or a size such as 50GiB. Nothing is fetched into it."
    )
    bytes_per_s: Annotated[Bytes, Field(ge=65_536)] | None = Field(
        None, description="For all downloads together, a number or a size such as 20MiB. Absent: as fast as they come.",
        examples=["20MiB"],
    )  # fmt: skip
    ca_file: Path | None = Field(
        None, description="More authorities that servers of models are trusted for, in PEM, beside those of the system.",
        examples=["/etc/ssl/site-ca.pem"],
    )  # fmt: skip
    proxy: Annotated[str, Field(pattern=r"^http://[A-Za-z0-9.\[\]:-]+/?$")] | None = Field(
        None, description="HTTP proxy that every download goes through; none but this one is used, whatever the environment says."
        " Names are looked up there, so that policy goes by names alone.",
        examples=["http://proxy.internal:3128"],
    )  # fmt: skip
    max_bytes: Bytes | None = Field(
        None, description="All that may be in it, a number or a size such as 500GiB; absent: as much as there is room for.",
        examples=["500GiB"],
    )  # fmt: skip
    gc: ModelGcConfig = ModelGcConfig()
    elsewhere: ModelPlaces | None = Field(
        None,
        description="Whose models on this machine are used where they lie, read-only: huggingface, lm-studio, llama.cpp, ollama,"
        " or directories laid out as theirs. Absent: all four of the daemon's user, in cloud none. Empty: none.",
        examples=[["huggingface", "/srv/models"]],
    )
