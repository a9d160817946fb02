"""What is answered about the cache of models."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from pool_managerd.api.schemas import Answer


class CachedModel(Answer):
    """A model that was fetched or imported; with ``tool``, one that another tool has on this machine."""

    ref: str
    path: str = Field(description="Its file, or the first one of a split model.")
    size_bytes: int
    files: int
    digest: str | None = Field(
        description="sha256:… of what was received, or as `tool` has it; with commas between those of several files."
    )
    verified: bool = Field(description="Whether that is what the hub, or a checksum in the configuration, said beforehand.")
    source: str | None = Field(None, description="The hub's commit that it is of.")
    fetched_at_ms: int = Field(description="When it was fetched or imported; with `tool`, when its file was written.")
    untouched: bool = Field(description="False: a file is gone or was changed; the next start fetches it again.")
    pools: list[str] = Field(description="Pools that are configured with it, or run it.")
    tool: str | None = Field(None, description="Whose it is, where it is not in the cache: it is used there, and never changed.")
    problem: str | None = Field(None, description="Why it cannot be used there.")


class PullAnswer(Answer):
    """With ``dry_run`` what would be fetched, else the operation, whose outcome is the model's row."""

    operation_id: str | None = None
    status: str | None = None
    outcome: dict[str, Any] | None = None
    ref: str | None = None
    present: bool | None = Field(None, description="Whether it is here already: in the cache, or where `tool` has it.")
    tool: str | None = Field(None, description="Whose it is, where it is not in the cache; it is hashed before it is used.")
    files: list[str] | None = None
    size_bytes: int | None = Field(None, description="Null where nobody says it beforehand.")


class ModelRemoved(Answer):
    ref: str
    freed_bytes: int
