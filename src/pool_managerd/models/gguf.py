"""Whether a file is a GGUF model at all: its first eight bytes. The rest of the header is read by `gguf_header`."""

from __future__ import annotations

import os
import struct
from contextlib import AbstractContextManager
from functools import partial

from pool_managerd.errors import SpecError
from pool_managerd.models.byte_reader import regular_file

MAGIC = b"GGUF"
VERSIONS = (2, 3)


def check_gguf(path: str) -> int:
    """The GGUF version of ``path``. Blocks for one small read. Raises SpecError when it is not a GGUF model."""
    with gguf_file(path) as fd:
        return version_in(path, os.pread(fd, 8, 0))


def is_gguf(path: str) -> bool:
    """True when ``path`` is a file that begins as GGUF does, whatever it is called: blobs of model caches have no suffix."""
    return head_of(path)[:4] == MAGIC


def head_of(path: str) -> bytes:
    """The first bytes of a regular file; b"" of anything else. Blocks for one small read."""
    try:
        with gguf_file(path) as fd:
            return os.pread(fd, 16, 0)
    except SpecError:
        return b""


def gguf_file(path: str) -> AbstractContextManager[int]:
    """A descriptor of ``path``, which may turn out to be anything. Raises SpecError when it is no file or cannot be read."""
    return regular_file(path, partial(refused, path))


def version_in(path: str, head: bytes) -> int:
    """The version in a file's first eight bytes. Raises SpecError, with a guess at what the file is instead."""
    if head[:4] != MAGIC or len(head) < 8:
        raise refused(path, f"it begins with {head[:4]!r} instead of b'GGUF'{_guess(head)}")
    version: int = struct.unpack("<I", head[4:8])[0]
    if version not in VERSIONS:
        if struct.unpack(">I", head[4:8])[0] in VERSIONS:
            raise refused(path, "it is big-endian, for another kind of machine")
        raise refused(path, f"its format version {version} is not one of {', '.join(map(str, VERSIONS))}")
    return version


def _guess(head: bytes) -> str:
    """What such a beginning usually means."""
    if head.startswith(b"version "):
        return ": a Git LFS pointer, not the model itself"
    if head.startswith((b"<", b"{")):
        return ": an error page saved as a model, or a JSON file"
    if head.startswith((b"PK", b"\x80")):
        return ": a PyTorch checkpoint, which must be converted to GGUF"
    if not head.strip(b"\0"):
        return ": the file is empty or not filled yet"
    return ""


def refused(path: str, reason: str) -> SpecError:
    """The error of a file that is no usable GGUF model."""
    return SpecError(
        f"cannot use {path} as a GGUF model: {reason}",
        hint="llama.cpp needs a GGUF file; check the download, or convert the model",
    )
