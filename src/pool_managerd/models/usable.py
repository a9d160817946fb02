"""Whether what lies at a path can be a model that an engine reads, and if not, why and what to do."""

from __future__ import annotations

import difflib
import os
import stat
from pathlib import Path

from pool_managerd.config import PolicyConfig
from pool_managerd.errors import PoolError, SpecError
from pool_managerd.models.gguf import MAGIC, check_gguf, head_of

PICKLED = frozenset({".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth"})
"""Formats that run code of their author's choice when they are loaded; what a file begins with says more than its name."""

PICKLE_HEADS = (b"PK\x03\x04", *(b"\x80" + bytes([protocol]) for protocol in range(2, 6)))
_MAX_NAMES = 10_000


def size_of(path: str | Path) -> int:
    """In bytes; 0 of what cannot be read, where nothing hangs on it. Blocks."""
    try:
        return Path(path).stat().st_size
    except OSError:
        return 0


def check_usable(path: Path, ref: str, policy: PolicyConfig) -> int:
    """Size of the model in bytes (0 for a directory). Blocks; run in a thread. Raises SpecError with the reason."""
    try:
        info = path.stat()
    except FileNotFoundError:
        raise _missing(path, ref) from None
    except OSError as error:
        raise _unusable(path, f"{error.strerror}", "check the path and its permissions") from error
    if stat.S_ISDIR(info.st_mode):
        return 0
    if not stat.S_ISREG(info.st_mode):
        raise _unusable(path, "it is neither a file nor a directory", "name the model file itself")
    if not os.access(path, os.R_OK):
        raise _unusable(path, "it is not readable for this user", "check its permissions and those of its directories")
    if info.st_size == 0:
        raise _unusable(path, "the file is empty", "fetch the model again")
    head = head_of(str(path))
    pickled = head[:4] != MAGIC and (path.suffix.lower() in PICKLED or head.startswith(PICKLE_HEADS))
    if pickled and not policy.allow_pickle:
        reason = f"{path.suffix or 'such'} files are pickles, which run code of their author's choice when loaded"
        raise _unusable(path, reason, "use the GGUF or safetensors form of the model, or policy.allow_pickle: true")
    if head[:4] == MAGIC or path.suffix.lower() == ".gguf":
        check_gguf(str(path))
    return info.st_size


def _missing(path: Path, ref: str) -> PoolError:
    try:
        names = [entry.name for entry, _ in zip(os.scandir(path.parent), range(_MAX_NAMES), strict=False)]
    except OSError:
        nearest = next((parent for parent in path.parents if parent.is_dir()), path.parent)
        return _unusable(path, "there is no such file", f"{ref} means {path}; of that path only {nearest} exists")
    near = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5) or sorted(n for n in names if n.endswith(".gguf"))[:3]
    beside = f"; beside it: {', '.join(near)}" if near else f"; {path.parent} holds no similar name"
    return _unusable(path, "there is no such file", f"{ref} means {path}{beside}")


def _unusable(path: Path, reason: str, hint: str) -> SpecError:
    return SpecError(f"cannot use the model {path}: {reason}", hint=hint)
