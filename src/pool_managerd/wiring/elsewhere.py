"""Which models of other tools a node may use, and whether its engines could read them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from pool_managerd.config import Config
from pool_managerd.errors import EngineError
from pool_managerd.models.cache import ModelCache
from pool_managerd.models.digests import DigestCache
from pool_managerd.models.elsewhere import Elsewhere
from pool_managerd.models.places import places_of
from pool_managerd.models.used_notes import UsedNotes
from pool_managerd.runtime.engine_users import UserRules, usual_user
from pool_managerd.runtime.reach import READ, Need, first_obstacle


def elsewhere_of(
    config: Config, cache: ModelCache, digests: DigestCache, users: UserRules, tell: Callable[[str], object] = lambda _: None
) -> Elsewhere:
    """The places that the configuration names, by the environment and home of this process."""

    def obstacle(path: str) -> str | None:
        try:
            user = usual_user(users)
        except EngineError:  # no engine can be started at all: its start says why
            return None
        found = None if user is None else first_obstacle([Need(path, READ)], user)
        return None if found is None else str(found)

    places = places_of(config.models_elsewhere, os.environ, Path(os.path.expanduser("~")))  # noqa: PTH111 - pathlib's may raise
    return Elsewhere(places, UsedNotes(cache), digests, obstacle, tell)
