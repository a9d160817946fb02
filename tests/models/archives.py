"""Archives for tests, also such as no sane tool writes."""

from __future__ import annotations

import gzip
import io
import tarfile
from collections.abc import Callable, Mapping

Contents = Mapping[str, bytes | Callable[[tarfile.TarInfo], None]]
"""By name: content, or what makes something else of a bare header."""


def tar_of(files: Contents, *, packed: bool = False) -> bytes:
    """Whose modes and owners are nobody's business."""
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.mode, info.uid, info.gid, info.uname = 0o6777, 4711, 4711, "somebody"
            if callable(content):
                content(info)
                tar.addfile(info)
            else:
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return gzip.compress(made.getvalue()) if packed else made.getvalue()


def folder(info: tarfile.TarInfo) -> None:
    info.type = tarfile.DIRTYPE


def link(target: str, *, hard: bool = False) -> Callable[[tarfile.TarInfo], None]:
    def make(info: tarfile.TarInfo) -> None:
        info.type, info.linkname = tarfile.LNKTYPE if hard else tarfile.SYMTYPE, target

    return make


def device(info: tarfile.TarInfo) -> None:
    info.type = tarfile.CHRTYPE
