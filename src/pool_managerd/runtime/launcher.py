"""Starting one engine: as whom, where, with which environment; then the order to the fork server."""

from __future__ import annotations

import asyncio
import errno
import os
import secrets
import socket
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from pool_managerd import failpoints
from pool_managerd.config import Profile
from pool_managerd.core.artifacts import AnyEngine, PreparedEngine
from pool_managerd.core.launch_record import FileStamp, LaunchRecord, record_of
from pool_managerd.core.purge import Freed
from pool_managerd.errors import EngineError, NodeError
from pool_managerd.runtime import attestation, isolation, procfs, wire
from pool_managerd.runtime.engine_users import EngineUsers, UserRules
from pool_managerd.runtime.environment import Places, engine_environment
from pool_managerd.runtime.files import RuntimeFiles
from pool_managerd.runtime.identity import Identity
from pool_managerd.runtime.pool_places import PoolPlaces
from pool_managerd.runtime.process import Connection, EngineProcess
from pool_managerd.runtime.program import check_runnable, explain_failure, failure, locate
from pool_managerd.runtime.slot_files import SlotFiles
from pool_managerd.runtime.spawner import Spawner, receive_answer
from pool_managerd.runtime.waiting import in_own_thread

NOTHING: Mapping[str, int] = MappingProxyType({})
_ANSWER_SECONDS = 15.0
_LIMITS = {"FSIZE": 256 << 30, "NOFILE": 65536}
_USER_DATABASES = ("/etc/passwd", "/etc/group", "/etc/nsswitch.conf")
_PROCESSES = 16384  # threads count, and a worker per GPU has hundreds; only where they are one pool's alone


@dataclass(frozen=True, slots=True)
class LaunchOptions:
    """How engines are run. ``users`` counts only when the daemon is root."""

    users: UserRules = field(default_factory=UserRules)
    profile: Profile = "home"
    log_max_bytes: int = 16 * 1024 * 1024
    log_keep: int = 2
    log_bytes_per_second: int = 4 * 1024 * 1024


class Launcher:
    """Starts engines through the spawner; one per daemon. ``tell`` is told, once, of what it cannot clear away."""

    def __init__(
        self, spawner: Spawner, files: RuntimeFiles, options: LaunchOptions, tell: Callable[[str], object] = lambda _: None
    ) -> None:
        self._spawner = spawner
        self._files = files
        self._options = options
        self._tell = tell
        self.users = EngineUsers(options.users, files)
        self._slots = SlotFiles(files.root)
        self._told: set[str] = set()
        self._looked: dict[str, tuple[tuple[object, ...], isolation.Choice]] = {}
        """By pool, what the last launch was found to run as, and all that this was judged by."""
        self._sweeps: set[asyncio.Task[None]] = set()

    async def launch(
        self, engine: PreparedEngine, *, epoch: int, grace_ms: int, reserved_bytes: Mapping[str, int] = NOTHING,
        exclusive: bool = False, decided_at_ms: int | None = None,
    ) -> EngineProcess:  # fmt: skip
        """Run the engine; ``grace_ms`` is what its shim allows it on SIGTERM when nobody says otherwise.

        For the record alone: ``reserved_bytes`` by GPU UUID, ``exclusive`` or not, and when it was decided (unix ms; None: now).

        Raises EngineError ("preload failed: cannot run …") with the remedy when it cannot be executed, and
        NodeError for a runtime directory that cannot be used. Cancelled, it leaves nothing running.
        """
        program = locate(engine)
        self._files.prepare_launch()
        # In a thread: it walks to every file and library that the engine needs, and asks the user database.
        choice, files = await in_own_thread(self._look, engine, program)
        now_ms = time.time_ns() // 1_000_000
        record = record_of(
            engine, epoch=epoch, reserved_bytes=reserved_bytes, log_mark=self._files.log_mark(engine.instance_id),
            decided_at_ms=now_ms if decided_at_ms is None else decided_at_ms, order_at_ms=now_ms, exclusive=exclusive,
            files=files,
        )  # fmt: skip
        order = self._order(engine, program, choice, record, grace_ms)
        if self._files.unswept:  # somebody else's directory, or a link, was in the place of the pool's
            self._begin_sweep()
        try:
            answer, connection = await self._exchange(engine, order)
        except EngineError:
            self._looked.pop(engine.pool_id, None)
            raise
        identity = Identity.from_json({**order["identity"], **{key: answer[key] for key in wire.STARTED_KEYS}})
        return EngineProcess(
            identity,
            connection,
            self._files.records,
            isolation=isolation.read_back(identity.pid),
            notice=self._new(choice.notice),
        )

    def check(self, engine: AnyEngine | None) -> None:
        """Raises EngineError when there is no such program, or none that can be executed."""
        if isinstance(engine, PreparedEngine):
            check_runnable(engine, locate(engine))

    def _look(self, engine: PreparedEngine, program: str) -> tuple[isolation.Choice, tuple[FileStamp, ...]]:
        """A launch that is the last one over again, from the same files, is not judged anew: exec tells what is in its way."""
        files = attestation.stamps(engine, program)
        seen = (engine, program, files, *map(attestation.stamp, _USER_DATABASES))
        before, choice = self._looked.pop(engine.pool_id, ((), None))
        if choice is None or before != seen:
            choice = isolation.choose(engine, program, self._files.root, self.users, self._options.profile)
        if not engine.device_uuids and engine.device_mask is None:  # the groups of device nodes may be others the next time
            self._looked[engine.pool_id] = seen, choice
        return choice, files

    async def forget(self, pool_id: str) -> None:
        """Leave nothing of a pool that is gone: a later one of its name gets none of its files, nor its uid by right."""
        with suppress(NodeError):  # a broken disk; the next daemon does it
            self._files.forget_pool(pool_id)
        self.users.forget(pool_id)
        self._looked.pop(pool_id, None)
        self._begin_sweep()

    async def measure(self, pool_id: str, places: Collection[str]) -> list[Freed]:
        """What ``purge`` would free. Raises NodeError."""
        return await in_own_thread(PoolPlaces(self._files.root).measured, pool_id, places)

    async def purge(self, pool_id: str, places: Collection[str]) -> list[Freed]:
        """Delete those of the pool's directories; its engine must be down. They have no name any more when this first waits.

        Raises NodeError.
        """
        pool_places = PoolPlaces(self._files.root)
        away = pool_places.put_away(pool_id, places)
        self._looked.pop(pool_id, None)
        return await in_own_thread(pool_places.remove, away)

    async def forget_others(self, pool_ids: Iterable[str]) -> None:
        """Do so with every pool that left something and is none of these."""
        with suppress(NodeError):
            self._files.forget_others(pool_ids)
        self._begin_sweep()

    def _begin_sweep(self) -> None:
        task = asyncio.create_task(self._sweep())
        self._sweeps.add(task)
        task.add_done_callback(self._sweeps.discard)

    async def _sweep(self) -> None:
        try:
            stays = await in_own_thread(self._files.sweep)
        except NodeError as problem:
            stays = [problem.message]
        for human in filter(None, map(self._new, stays)):
            self._tell(human)

    def _new(self, notice: str | None) -> str | None:
        """What was not said yet: it is true of every launch."""
        if notice in self._told or notice is None:
            return None
        self._told.add(notice)
        return notice

    def _order(
        self, engine: PreparedEngine, program: str, choice: isolation.Choice, launch: LaunchRecord, grace_ms: int
    ) -> dict[str, Any]:
        user = choice.user
        nonce = secrets.token_hex(16)
        record = self._files.records.path(launch.instance, launch.epoch, nonce)
        owner = (user.uid, user.gid) if user else (os.geteuid(), os.getegid())
        places = Places(
            home=str(self._files.workdir(engine.pool_id, *owner)),
            temporary=str(self._files.temporary(engine.pool_id, nonce, *owner)),
            cache=str(self._files.cachedir(engine.pool_id, *owner)),
            user=user.name if user else isolation.user_name(os.geteuid()),
        )
        if engine.keeps_slots:
            self._slots.make(engine.pool_id, *owner)
        return {
            "v": wire.VERSION,
            "identity": {
                "nonce": nonce,
                "boot_id": procfs.boot_id(),
                "pool_id": engine.pool_id,
                "replica_id": engine.replica_id,
                "epoch": launch.epoch,
                "record_path": str(record),
                "cgroup": "",
                "uid": user.uid if user and choice.own_uid else 0,
            },
            "launch": launch.to_json(),
            "runtime_dir": str(self._files.root),
            "record_name": record.name,
            "log": {
                "name": self._files.log_path(launch.instance).name,
                "max_bytes": self._options.log_max_bytes,
                "keep": self._options.log_keep,
                "bytes_per_second": self._options.log_bytes_per_second,
            },
            "grace_ms": grace_ms,
            "program": program,
            "argv": list(engine.argv),
            "env": engine_environment(os.environ, engine.env, places, nonce),
            "cwd": places.home,
            "temporary": os.path.basename(places.temporary),
            "credentials": user.to_json() if user else None,
            "limits": {**_LIMITS, **({"NPROC": _PROCESSES} if choice.own_uid else {})},
        }

    async def _exchange(self, engine: PreparedEngine, order: dict[str, Any]) -> tuple[dict[str, Any], Connection]:
        try:
            frame = wire.encode(order)
        except wire.WireError as error:
            raise failure(engine, "its flags and environment are too long", "shorten them to less than 1 MiB") from error
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
                raise failure(engine, f"no answer for {_ANSWER_SECONDS:.0f} s", "try again; see the daemon's log") from error
            if answer.get("ok") is True and len(fds) == 2:
                return answer, Connection(channel, *fds)
            channel.close()
            for fd in fds:
                os.close(fd)
            if answer.get("ok") is True:  # the kernel left descriptors out: this process has too many
                raise failure(engine, os.strerror(errno.EMFILE), "raise the daemon's limit of open files", retriable=True)
            if answer:
                raise explain_failure(engine, order["program"], str(answer.get("step")), int(answer.get("errno") or 0))
        said = self._spawner.stderr_tail()
        raise failure(engine, "the process that starts engines died", "try again; see the daemon's log", stderr=said)


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
                failpoints.reach("engine.spawned")
                with suppress(OSError):  # an engine that ended at once took its shim along; the record is there
                    channel.send(wire.encode({"op": "keep"}))
                failpoints.reach("engine.kept")
            return frames[0], fds
        if not data:
            return {}, fds
