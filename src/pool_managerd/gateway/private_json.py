"""A small file of the gateway's own user alone, which is there whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def write(place: Path, value: Any, *, durable: bool) -> None:
    """In the place of what was there. ``durable``: it outlives the machine's power. Raises OSError."""
    temporary = place.with_name(f"{place.name}.{os.getpid()}.new")
    temporary.unlink(missing_ok=True)
    with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600), "w") as file:  # noqa: PTH123
        json.dump(value, file, indent=1)
        if durable:
            file.flush()
            os.fsync(file.fileno())
    temporary.replace(place)
