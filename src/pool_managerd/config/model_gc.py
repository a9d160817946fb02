"""The section `models.gc`: what may be deleted of the cache of models, and when."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from pool_managerd.config.values import Section


class ModelGcConfig(Section):
    """When models in the cache are deleted that nobody needs any more. Pinned ones never are."""

    enabled: bool = Field(False, description="Delete them where models.max_bytes or models.keep_free_bytes would not hold.")
    keep_days: Annotated[int, Field(ge=0, le=3650)] = Field(
        7, description="What somebody has needed within so many days stays; so long are parts of downloads kept, too."
    )
