"""The program of an engine: where it is, whether it can be run, and in words why it cannot."""

from __future__ import annotations

import errno
import os
import shutil
from typing import Any

from pool_managerd.core.artifacts import PreparedEngine
from pool_managerd.errors import EngineError
from pool_managerd.runtime.files import log_name


def locate(engine: PreparedEngine) -> str:
    """The absolute path of the engine's binary: as given, or looked up on PATH when it is a bare name.

    Raises EngineError for text that no program can be given.
    """
    given = engine.binary_path
    if "\0" in given or any("\0" in text for text in (*engine.flags, *engine.env, *engine.env.values())):
        raise failure(engine, "a NUL byte is in its path, flags or environment", "remove it")
    return os.path.abspath(given if "/" in given else shutil.which(given) or given)


def check_runnable(engine: PreparedEngine, path: str) -> None:
    """Raises EngineError when the program is missing, no file or not executable."""
    if not os.path.exists(path):
        raise failure(engine, "no such file", "check the path, or install the engine")
    if os.path.isdir(path):
        raise failure(engine, "it is a directory", "name the binary inside it")
    if not os.path.isfile(path):
        raise failure(engine, "it is no regular file", "name the binary itself")
    if not os.access(path, os.X_OK):
        raise failure(engine, "it is not executable", f"chmod +x {path}")


def explain_failure(engine: PreparedEngine, program: str, step: str, code: int) -> EngineError:
    """An EngineError for a step of the shim that failed with errno ``code``."""
    reason = os.strerror(code) if code else "an internal error"
    if step == "exec" and code == errno.ENOENT:
        return failure(engine, "the interpreter or loader that it names is missing", f"see: head -1 {program}; ldd {program}")
    if step == "exec" and code == errno.ENOEXEC:
        return failure(engine, "it is no program for this machine (or a script without #!)", f"see: file {program}")
    if step == "exec" and code == errno.EACCES:
        return failure(engine, "permission denied", "it, its interpreter or its file system must allow execution")
    if step == "exec" and code == errno.ETXTBSY:
        return failure(engine, "it is being written to", "try again when it is complete", retriable=True)
    if step == "log":
        path = log_name(engine.instance_id)
        return failure(engine, f"its log {path} is a link or no regular file", f"find out who put it there and remove {path}")
    if step in ("runtime_dir", "record"):
        return failure(engine, f"the runtime directory cannot be written: {reason}", "free space there, or make it writable")
    if step == "exec":
        return failure(engine, reason, "run it by hand to see what it needs")
    return failure(engine, f"step '{step}' failed: {reason}", "the daemon's user or container may lack a permission")


def failure(engine: PreparedEngine, reason: str, hint: str, *, retriable: bool = False, **details: Any) -> EngineError:
    return EngineError(
        f"preload failed: cannot run {engine.binary_path}: {reason}",
        code="PRELOAD_FAILED",
        hint=hint,
        retriable=retriable,
        pool_id=engine.pool_id,
        details=details,
    )
