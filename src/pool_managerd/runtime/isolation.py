"""As whom an engine runs, decided before the start and read back from the kernel after it."""

from __future__ import annotations

import os
import pwd
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pool_managerd.config import Profile
from pool_managerd.core.artifacts import PreparedEngine
from pool_managerd.errors import EngineError
from pool_managerd.runtime import procfs
from pool_managerd.runtime.reach import ENTER, READ, Need, Obstacle, User, first_obstacle

DEFAULT_USER = "nobody"
_MAX_SHEBANG_BYTES = 256
_POWERLESS_ROOT = User("root", 0, 0, (0,))


@dataclass(frozen=True, slots=True)
class Choice:
    """``user`` None: the daemon's own uid. ``notice`` says what is weaker than it could be, None when nothing is."""

    user: User | None
    notice: str | None = None


def choose(engine: PreparedEngine, program: str, runtime_dir: Path, engine_user: str | None, profile: Profile) -> Choice:
    """Whom to run the engine as. Raises EngineError naming the first path that this user cannot reach.

    Profile ``dev`` runs it as root without capabilities instead, when root can reach it that way.
    """
    if os.geteuid() != 0:
        ignored = engine_user not in (None, user_name(os.geteuid()))
        return Choice(None, f"engine_user {engine_user!r} is ignored: only root can change users" if ignored else None)
    user = _look_up(engine, engine_user or DEFAULT_USER)
    needs = list(_needs(engine, program, runtime_dir))
    obstacle = first_obstacle(needs, user)
    if obstacle is None and user.uid != 0:
        return Choice(user)
    if obstacle is None:
        return Choice(None, f"The engine of pool '{engine.pool_id}' runs as root without capabilities, as engine_user says")
    if user.uid != 0 and profile == "dev" and first_obstacle(needs, _POWERLESS_ROOT) is None:
        return Choice(None, f"The engine of pool '{engine.pool_id}' runs as root without capabilities: {obstacle}")
    raise _unreachable(engine, user, obstacle)


def read_back(pid: int) -> str:
    """What the kernel says about process ``pid``: a list of ``user:NAME`` (when not ours), ``no_new_privs``,
    ``no_caps``; "none" when nothing holds and "unknown" when the process is gone.
    """
    status = procfs.status(pid)
    if status is None:
        return "unknown"
    uids = {int(uid) for uid in status.get("Uid", "").split()}
    sealed = status.get("NoNewPrivs") == "1"
    parts = [f"user:{user_name(uid)}" for uid in uids if uids != {os.geteuid()}]
    if sealed:
        parts.append("no_new_privs")
    # The bounding set only matters when exec can still gain something from it.
    sets = ("CapEff", "CapPrm", "CapInh", "CapAmb") if sealed else ("CapEff", "CapPrm", "CapInh", "CapAmb", "CapBnd")
    if all(int(status.get(name, "0"), 16) == 0 for name in sets):
        parts.append("no_caps")
    return ",".join(parts) or "none"


def user_name(uid: int) -> str:
    """The user's name, or its number when it has none."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _look_up(engine: PreparedEngine, name: str) -> User:
    try:
        found = pwd.getpwnam(name)
    except KeyError as error:
        raise EngineError(
            f"preload failed: cannot run {engine.binary_path} as user {name!r}: there is no such user",
            hint="create the user, or set daemon.engine_user to one that exists",
            pool_id=engine.pool_id,
        ) from error
    groups = sorted(set(os.getgrouplist(name, found.pw_gid)))
    return User(name, found.pw_uid, found.pw_gid, tuple(groups))


def _needs(engine: PreparedEngine, program: str, runtime_dir: Path) -> Iterator[Need]:
    yield Need(program, ENTER)
    interpreter = _interpreter(program)
    if interpreter is not None:
        yield Need(interpreter, ENTER)
        yield Need(program, READ)
    if engine.model_path is not None:
        for path in engine.model_files or (engine.model_path,):
            yield Need(path, READ)
    for flag in engine.flags:
        value = flag.partition("=")[2] if flag.startswith("-") else flag
        if value.startswith("/") and os.path.isfile(value):
            yield Need(value, READ)
    if program == os.path.abspath(sys.executable):
        # An engine in our own interpreter imports our package and its libraries.
        for folder in (str(Path(__file__).parent.parent), sysconfig.get_path("stdlib"), sysconfig.get_path("purelib")):
            yield Need(folder, READ | ENTER)
    yield Need(str(runtime_dir / "work"), ENTER)


def _interpreter(program: str) -> str | None:
    try:
        with open(program, "rb") as file:
            head = file.read(_MAX_SHEBANG_BYTES)
    except OSError:
        return None
    if not head.startswith(b"#!"):
        return None
    words = head[2:].split(b"\n", 1)[0].split()
    return os.fsdecode(words[0]) if words else None


def _unreachable(engine: PreparedEngine, user: User, obstacle: Obstacle) -> EngineError:
    return EngineError(
        f"preload failed: cannot run {engine.binary_path} as user {user.name!r}: {obstacle}",
        code="PRELOAD_FAILED",
        hint=f"move it to where every user may go, such as /opt or /srv, or open {obstacle.path}, or set daemon.engine_user",
        pool_id=engine.pool_id,
    )
