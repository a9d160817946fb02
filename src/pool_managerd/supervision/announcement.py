"""What others find of one pool in the runtime directory: its pid and handoff files (SPEC §12)."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from pool_managerd.errors import PoolError
from pool_managerd.supervision.pool import Pool, Role
from pool_managerd.supervision.protocols import Emit
from pool_managerd.supervision.services import Services


class Announcement:
    """Called by the pool's actor alone."""

    def __init__(self, pool: Pool, emit: Emit, services: Services) -> None:
        self._pool, self._emit, self._s = pool, emit, services

    def announce(self) -> Path | None:
        """Write the handoff files of the present launch; where, unless somebody else announces it. Raises PoolError.

        A candidate is nobody's yet: it is announced when it takes its place.
        """
        launch = self._pool.launch
        if launch.prepared is None or self._pool.definition.announced or self._pool.role is Role.CANDIDATE:
            return None
        pid = launch.process.pid if launch.process is not None else 0
        return self._s.files.write_handoff(launch.prepared, pid, written_at_ms=self._s.clock.wall_ms())

    def withdraw(self) -> None:
        """The pid file is gone before ``live`` turns false (DESIGN §7). Raises PoolError."""
        self._s.files.remove_pid(self._pool.instance_id)
        if self._pool.launch.prepared is not None and not self._pool.definition.announced:
            self._s.files.remove_handoff(self._pool.launch.prepared.instance_id)

    def retire(self) -> None:
        """Another instance has its place: nobody is led to it any more, though it is there. Raises PoolError."""
        if self._pool.launch.prepared is not None:
            self._s.files.remove_handoff(self._pool.launch.prepared.instance_id)

    def put_back(self) -> None:
        """A cleaner of old files, or a person, may take those of an engine that runs; its shim does the same with its record."""
        process = self._pool.launch.process
        if process is None or self._pool.role is Role.CANDIDATE or self._s.files.are_there(self._pool.instance_id):
            return
        with suppress(PoolError):  # a full disk is told where it keeps somebody waiting; the next probe tries it again
            self._s.files.write_pid(self._pool.instance_id, process.pid)
            self.announce()
            where = f"Files of pool '{self._pool.pool_id}' were removed from the runtime directory"
            hint = "keep what clears old files away (systemd-tmpfiles, tmpreaper) from daemon.runtime_dir"
            self._emit("notice", f"{where} while its engine runs; they are written again", level="warn", hint=hint)
