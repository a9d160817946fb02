"""Whether an engine still is what its launch was started from: the files that it was started from, then and now."""

from __future__ import annotations

import os
from collections.abc import Collection

from pool_managerd.core.artifacts import PreparedEngine
from pool_managerd.core.launch_record import FileStamp

MAX_FILES = 64


def stamps(engine: PreparedEngine, program: str) -> tuple[FileStamp, ...]:
    """Of the program and the model as they are now; what cannot be looked at is left out. Blocks for a moment."""
    models = engine.model_files or ((engine.model_path,) if engine.model_path else ())
    found = (stamp(path) for path in (program, *models[:MAX_FILES]))
    return tuple(one for one in found if one is not None)


def changed(then: Collection[FileStamp]) -> list[str]:
    """The paths of those that are not any more what they were: replaced, written to, or gone."""
    return [one.path for one in then if stamp(one.path) != one]


def stamp(path: str) -> FileStamp | None:
    """What tells the file from another one, or from itself before it was written to; None when it cannot be looked at."""
    try:
        seen = os.stat(path)
    except (OSError, ValueError):
        return None
    return FileStamp(path, seen.st_dev, seen.st_ino, seen.st_size, seen.st_ctime_ns)
