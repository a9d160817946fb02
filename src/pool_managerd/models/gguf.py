"""Whether a file is a GGUF model at all: its first eight bytes. Reading the header in full is for the fit check."""

from __future__ import annotations

import os
import stat
import struct

from pool_managerd.errors import SpecError

MAGIC = b"GGUF"
VERSIONS = (2, 3)


def check_gguf(path: str) -> int:
    """The GGUF version of ``path``. Blocks for one small read. Raises SpecError when it is not a GGUF model."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise _refused(path, f"it cannot be read ({error.strerror})") from error
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise _refused(path, "it is not a file")
        head = os.read(fd, 8)
    finally:
        os.close(fd)
    if head[:4] != MAGIC or len(head) < 8:
        raise _refused(path, f"it begins with {head[:4]!r} instead of b'GGUF'{_guess(head)}")
    version: int = struct.unpack("<I", head[4:])[0]
    if version not in VERSIONS:
        if struct.unpack(">I", head[4:])[0] in VERSIONS:
            raise _refused(path, "it is big-endian, for another kind of machine")
        raise _refused(path, f"its format version {version} is not one of {', '.join(map(str, VERSIONS))}")
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


def _refused(path: str, reason: str) -> SpecError:
    return SpecError(
        f"cannot use {path} as a GGUF model: {reason}",
        hint="llama.cpp needs a .gguf file; check the download, or convert the model",
    )
