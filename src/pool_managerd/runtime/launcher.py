"""Starting one engine: as whom, where, with which environment; then the order to the fork server."""

from __future__ import annotations

import asyncio
import errno
import os
import secrets
import shutil
import socket
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from pool_managerd.config import Profile
from pool_managerd.core.artifacts import PreparedEngine
from pool_managerd.errors import EngineError
from pool_managerd.runtime import isolation, procfs, wire
from pool_managerd.runtime.environment import engine_environment
from pool_managerd.runtime.files import RuntimeFiles
from pool_managerd.runtime.identity import Identity
from pool_managerd.runtime.process import Connection, EngineProcess
from pool_managerd.runtime.spawner import Spawner, receive_answer

_ANSWER_SECONDS = 15.0


@dataclass(frozen=True, slots=True)
class LaunchOptions:
    """How engines are run. ``engine_user`` counts only when the daemon is root; None means ``nobody``."""

    engine_user: str | None = None
    profile: Profile = "home"
    log_max_bytes: int = 16 * 1024 * 1024
    log_keep: int = 2
    log_bytes_per_second: int = 4 * 1024 * 1024


class Launcher:
    """Starts engines through the spawner; one per daemon."""

    def __init__(self, spawner: Spawner, files: RuntimeFiles, options: LaunchOptions) -> None:
        self._spawner = spawner
        self._files = files
        self._options = options

    async def launch(self, engine: PreparedEngine, *, epoch: int, grace_ms: int) -> EngineProcess:
        """Run the engine; ``grace_ms`` is what its shim allows it on SIGTERM when nobody says otherwise.

        Raises EngineError ("preload failed: cannot run …") with the remedy when it cannot be executed, and
        NodeError for a runtime directory that cannot be used. Cancelled, it leaves nothing running.
        """
        program = find_program(engine)
        self._files.prepare()
        choice = isolation.choose(engine, program, self._files.root, self._options.engine_user, self._options.profile)
        order = self._order(engine, program, choice, epoch, grace_ms)
        answer, connection = await self._exchange(engine, order)
        identity = Identity.from_json({**order["identity"], **{key: answer[key] for key in wire.STARTED_KEYS}})
        return EngineProcess(
            identity, connection, self._files.records, isolation=isolation.read_back(identity.pid), notice=choice.notice
        )

    def _order(self, engine: PreparedEngine, program: str, choice: isolation.Choice, epoch: int, grace_ms: int) -> dict[str, Any]:
        user = choice.user
        nonce = secrets.token_hex(16)
        record = self._files.records.path(engine.pool_id, engine.replica_id, epoch, nonce)
        workdir = self._files.workdir(engine.pool_id, *((user.uid, user.gid) if user else (os.geteuid(), os.getegid())))
        return {
            "v": wire.VERSION,
            "identity": {
                "nonce": nonce,
                "boot_id": procfs.boot_id(),
                "pool_id": engine.pool_id,
                "replica_id": engine.replica_id,
                "epoch": epoch,
                "record_path": str(record),
                "cgroup": "",
            },
            "runtime_dir": str(self._files.root),
            "record_name": record.name,
            "log": {
                "name": self._files.log_path(engine.pool_id).name,
                "max_bytes": self._options.log_max_bytes,
                "keep": self._options.log_keep,
                "bytes_per_second": self._options.log_bytes_per_second,
            },
            "grace_ms": grace_ms,
            "program": program,
            "argv": list(engine.argv),
            "env": engine_environment(os.environ, engine.env, home=str(workdir), nonce=nonce),
            "cwd": str(workdir),
            "credentials": {"uid": user.uid, "gid": user.gid, "groups": list(user.groups)} if user else None,
        }

    async def _exchange(self, engine: PreparedEngine, order: dict[str, Any]) -> tuple[dict[str, Any], Connection]:
        try:
            frame = wire.encode(order)
        except wire.WireError as error:
            raise _failure(engine, "its flags and environment are too long", "shorten them to less than 1 MiB") from error
        for _ in range(2):  # a fork server that dies with the order in its hands has started nothing
            channel = await self._spawner.open_channel()
            try:
                async with asyncio.timeout(_ANSWER_SECONDS):
                    answer, fds = await _ask(channel, frame)
            except BaseException as error:  # also when cancelled: the closed channel makes the shim end it all
                channel.close()
                if not isinstance(error, TimeoutError):
                    raise
                await self._spawner.close()  # it may be stuck; the next launch starts a fresh one
                raise _failure(engine, f"no answer for {_ANSWER_SECONDS:.0f} s", "try again; see the daemon's log") from error
            if answer.get("ok") is True and len(fds) == 2:
                return answer, Connection(channel, *fds)
            channel.close()
            for fd in fds:
                os.close(fd)
            if answer.get("ok") is True:  # the kernel left descriptors out: this process has too many
                raise _failure(engine, os.strerror(errno.EMFILE), "raise the daemon's limit of open files", retriable=True)
            if answer:
                raise explain_failure(engine, order["program"], str(answer.get("step")), int(answer.get("errno") or 0))
        said = self._spawner.complaints()
        raise _failure(engine, "the process that starts engines died", "try again; see the daemon's log", stderr=said)


async def _ask(channel: socket.socket, frame: bytes) -> tuple[dict[str, Any], list[int]]:
    """Send the order and take the answer; an empty one when the other end closed. Raises WireError."""
    try:
        await asyncio.get_running_loop().sock_sendall(channel, frame)
    except ConnectionError:
        return {}, []
    decoder, fds = wire.Decoder(), list[int]()
    while True:
        data, received = await receive_answer(channel)
        fds += received
        frames = decoder.feed(data)
        if frames:
            if frames[0].get("ok") is True and len(fds) == 2:
                with suppress(OSError):  # an engine that ended at once took its shim along; the record is there
                    channel.send(wire.encode({"op": "keep"}))
            return frames[0], fds
        if not data:
            return {}, fds


def find_program(engine: PreparedEngine) -> str:
    """The absolute path of the engine's binary: as given, or looked up on PATH when it is a bare name.

    Raises EngineError when it is missing, a directory or not executable.
    """
    if engine.attach_url is not None:
        raise _failure(engine, "it is attached by URL and not ours to start", "remove the URL, or only probe it")
    given = engine.binary_path
    if "\0" in given or any("\0" in text for text in (*engine.flags, *engine.env, *engine.env.values())):
        raise _failure(engine, "a NUL byte is in its path, flags or environment", "remove it")
    path = os.path.abspath(given if "/" in given else shutil.which(given) or given)
    if not os.path.exists(path):
        raise _failure(engine, "no such file", "check the path, or install the engine")
    if os.path.isdir(path):
        raise _failure(engine, "it is a directory", "name the binary inside it")
    if not os.access(path, os.X_OK):
        raise _failure(engine, "it is not executable", f"chmod +x {path}")
    return path


def explain_failure(engine: PreparedEngine, program: str, step: str, code: int) -> EngineError:
    """An EngineError for a step of the shim that failed with errno ``code``."""
    reason = os.strerror(code) if code else "an internal error"
    if step == "exec" and code == errno.ENOENT:
        return _failure(engine, "the interpreter or loader that it names is missing", f"see: head -1 {program}; ldd {program}")
    if step == "exec" and code == errno.ENOEXEC:
        return _failure(engine, "it is no program for this machine (or a script without #!)", f"see: file {program}")
    if step == "exec" and code == errno.EACCES:
        return _failure(engine, "permission denied", "it, its interpreter or its file system must allow execution")
    if step == "exec" and code == errno.ETXTBSY:
        return _failure(engine, "it is being written to", "try again when it is complete", retriable=True)
    if step == "log":
        path = f"engine-{engine.pool_id}.log"
        return _failure(engine, f"its log {path} is a link or no regular file", f"find out who put it there and remove {path}")
    if step in ("runtime_dir", "record"):
        return _failure(engine, f"the runtime directory cannot be written: {reason}", "free space there, or make it writable")
    if step == "exec":
        return _failure(engine, reason, "run it by hand to see what it needs")
    return _failure(engine, f"step '{step}' failed: {reason}", "the daemon's user or container may lack a permission")


def _failure(engine: PreparedEngine, reason: str, hint: str, *, retriable: bool = False, **details: Any) -> EngineError:
    return EngineError(
        f"preload failed: cannot run {engine.binary_path}: {reason}",
        code="PRELOAD_FAILED",
        hint=hint,
        retriable=retriable,
        pool_id=engine.pool_id,
        details=details,
    )
