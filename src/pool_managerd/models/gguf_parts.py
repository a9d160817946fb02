"""The files of one GGUF model: most are one file; a split model's parts lie beside each other, named by number."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from pool_managerd.models.gguf import refused
from pool_managerd.models.gguf_header import Value, read_gguf_header

MAX_PARTS = 999

_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


def model_parts(path: str) -> tuple[str, ...]:
    """Every file of the model at ``path``, the first part first. Blocking; the header is read of files named like a part alone.

    Raises SpecError when ``path`` is another part than the first, or when parts are missing.
    """
    named = _PART.fullmatch(Path(path).name)
    if named is None or int(named["count"]) < 2:
        return (path,)
    return (path, *other_parts(path, read_gguf_header(path).values))


def other_parts(path: str, values: Mapping[str, Value]) -> list[str]:
    """The parts of a split model after the first, whose header has ``values``; none of a model in one file. Raises SpecError."""
    told = values.get("split.count")
    count = told if isinstance(told, int) and told > 1 else 1
    if count == 1:
        return []
    named = _PART.fullmatch(Path(path).name)
    if named is None or int(named["count"]) != count or count > MAX_PARTS:
        raise refused(path, f"it is one of {count} parts, and its name does not end in -00001-of-{count:05d}.gguf")
    if int(named["number"]) != 1 or values.get("split.no") != 0:
        raise refused(path, f"it is not the first of {count} parts; name {named['stem']}-00001-of-{count:05d}.gguf instead")
    return parts_beside(path, count)


def parts_beside(path: str, count: int) -> list[str]:
    """The other files of a model whose first of ``count`` parts is ``path``. Raises SpecError when some are missing."""
    folder, stem = Path(path).parent, Path(path).name.removesuffix(f"-00001-of-{count:05d}.gguf")
    names = [f"{stem}-{number:05d}-of-{count:05d}.gguf" for number in range(2, count + 1)]
    missing = [name for name in names if not os.path.lexists(folder / name)]
    if missing:
        raise refused(path, f"{len(missing)} of its {count} parts are missing, first {missing[0]}")
    return [str(folder / name) for name in names]
