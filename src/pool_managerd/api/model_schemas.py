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
    pools: list[str] = Field(description="Pools that need it: configured with it, running it, or being changed to it or from it.")
    lifecycle: str = Field("active", description="active; retired: nobody has needed it for models.gc.keep_days.")
    pinned: bool = Field(False, description="It is never deleted.")
    last_used_ms: int | None = Field(None, description="When a pool was started with it last.")
    last_verified_ms: int | None = Field(None, description="When all of it was hashed last, and right.")
    tool: str | None = Field(None, description="Whose it is, where it is not in the cache: it is used there, and never changed.")
    problem: str | None = Field(None, description="Why it cannot be used there.")


class Fit(Answer):
    """Where a model would run that is not here yet."""

    pool_id: str | None = Field(description="Null: no pool has it, and this is what it would need by itself.")
    ctx: int | None
    slots: int
    where: str | None = Field(description="On which GPUs, and how much of them; null where it would not run.")
    needs: list[str] = Field(description="The parts of that.")
    problem: str | None = Field(description="What is in its way now.")


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
    architecture: str | None = Field(None, description="By the headers of its files, which are read before it is fetched.")
    quantization: str | None = None
    ctx_train: int | None = Field(None, description="Tokens of context that it was trained for.")
    problem: str | None = Field(None, description="Why no engine could use it.")
    fits: list[Fit] | None = Field(None, description="Where its pools would run; null where its headers do not tell.")


class ModelRemoved(Answer):
    ref: str
    freed_bytes: int


class GcRow(Answer):
    """A model, or something that is left over: what becomes of it, and why."""

    name: str = Field(description="A model's reference, or a path below the cache.")
    kind: str = Field(description="model, download (a part of one), file (no model has it), temporary, or note (unreadable).")
    size_bytes: int
    action: str = Field(description="delete or keep.")
    why: str
    frees_bytes: int


class GcAnswer(Answer):
    """What was deleted, or with ``dry_run`` would be, in that order; then what stays."""

    rows: list[GcRow]
    freed_bytes: int
    used_bytes: int = Field(description="What all of the cache took before.")
    max_bytes: int | None = Field(None, description="models.max_bytes.")
    free_bytes: int = Field(description="What was free on its disk before.")
    keep_free_bytes: int = Field(description="models.keep_free_bytes.")
