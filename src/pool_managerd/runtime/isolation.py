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
from pool_managerd.runtime.directory import open_regular
from pool_managerd.runtime.engine_users import EngineUsers
from pool_managerd.runtime.loading import loader_obstacle
from pool_managerd.runtime.program import check_runnable
from pool_managerd.runtime.reach import ENTER, READ, Need, Obstacle, User, first_obstacle

_MAX_SHEBANG_BYTES = 256


@dataclass(frozen=True, slots=True)
class Choice:
    """``user`` None: the daemon's own uid. ``own_uid``: nobody but this pool's engines runs as the user.

    ``notice`` says what is weaker than it could be, None when nothing is.
    """

    user: User | None
    notice: str | None = None
    own_uid: bool = False


def choose(engine: PreparedEngine, program: str, runtime_dir: Path, users: EngineUsers, profile: Profile) -> Choice:
    """Whom to run the engine as. Raises EngineError naming the first path that this user cannot reach, and in
    profile ``cloud`` when it would share the daemon's user, which no wall separates it from.
    """
    if os.geteuid() != 0:
        ignored = f", as only root can change users (daemon.engine_user: {users.named})" if users.named else ""
        check_runnable(engine, program)
        return _shared(engine, profile, f"both run as user '{user_name(os.geteuid())}'{ignored}")
    user, notice = users.of(engine)
    require_reach(engine, program, runtime_dir, user)
    if user.uid == 0:
        return _shared(engine, profile, "both run as root, as daemon.engine_user says")
    return Choice(user, notice, own_uid=users.is_own(engine.pool_id, user))


def require_reach(engine: PreparedEngine, program: str, runtime_dir: Path, user: User) -> None:
    """Raises EngineError naming the first path of all that the engine needs which ``user`` cannot reach."""
    obstacle = first_obstacle(_needs(engine, program, runtime_dir), user)
    library_path = engine.env.get("LD_LIBRARY_PATH", os.environ.get("LD_LIBRARY_PATH", ""))
    obstacle = obstacle or loader_obstacle(_interpreter(program) or program, user, library_path)
    if obstacle is not None:
        raise _unreachable(engine, user, obstacle)


def _shared(engine: PreparedEngine, profile: Profile, why: str) -> Choice:
    if profile == "cloud":
        raise EngineError(
            f"preload failed: cannot run {engine.binary_path} in profile cloud: nothing would separate it from the daemon, {why}",
            code="ISOLATION_REQUIRED",
            hint="run the daemon as root, so that each pool gets a user of its own, and leave daemon.engine_user out",
            pool_id=engine.pool_id,
        )
    return Choice(None, f"Engines here are not isolated from the daemon: {why}. They get no new privileges and no capabilities")


def read_back(pid: int) -> str:
    """What the kernel says about process ``pid``: ``user:NAME`` or ``user:UID``, ``no_new_privs``, ``no_caps``.

    "none" when it shares our uid: it can read our memory and write our files, whatever else holds. "unknown" when the
    process is gone.
    """
    status = procfs.status(pid)
    if status is None:
        return "unknown"
    uids = {int(uid) for uid in status.get("Uid", "").split()}
    if os.geteuid() in uids or 0 in uids:
        return "none"
    sealed = status.get("NoNewPrivs") == "1"
    parts = [f"user:{user_name(uid)}" for uid in sorted(uids)]
    if sealed:
        parts.append("no_new_privs")
    # The bounding set only matters when exec can still gain something from it.
    sets = ("CapEff", "CapPrm", "CapInh", "CapAmb") if sealed else ("CapEff", "CapPrm", "CapInh", "CapAmb", "CapBnd")
    if all(int(status.get(name, "0"), 16) == 0 for name in sets):
        parts.append("no_caps")
    return ",".join(parts)


def user_name(uid: int) -> str:
    """The user's name, or its number when it has none."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _needs(engine: PreparedEngine, program: str, runtime_dir: Path) -> Iterator[Need]:
    """One after the other: nothing is opened that the user was not found to reach."""
    yield Need(program, 0)  # root's eyes must not tell a submitter what is in closed folders
    check_runnable(engine, program)
    yield Need(program, ENTER)
    interpreter = _interpreter(program)
    if interpreter is not None:
        yield Need(program, READ)
        yield Need(interpreter, ENTER)
    if engine.model_path is not None:
        for path in engine.model_files or (engine.model_path,):
            yield Need(path, READ)
    for flag in engine.flags if not engine.verbatim else ():
        value = flag.partition("=")[2] if flag.startswith("-") else flag
        if value.startswith("/") and os.path.isfile(value):
            yield Need(value, READ)
    if program == os.path.abspath(sys.executable):
        yield from interpreter_needs()
    yield Need(str(runtime_dir / "work"), ENTER)


def interpreter_needs() -> Iterator[Need]:
    """What an engine in our own interpreter must reach: it imports our package and its libraries."""
    yield Need(os.path.abspath(sys.executable), ENTER)
    for folder in (str(Path(__file__).parent.parent), sysconfig.get_path("stdlib"), sysconfig.get_path("purelib")):
        yield Need(folder, READ | ENTER)


def _interpreter(program: str) -> str | None:
    """What a script's first line names. The program may be a submitter's: never wait for what is no file."""
    try:
        with open_regular(program) as fd:
            head = os.read(fd, _MAX_SHEBANG_BYTES)
    except OSError:
        return None
    if not head.startswith(b"#!"):
        return None
    words = head[2:].split(b"\n", 1)[0].split()
    return os.fsdecode(words[0]) if words else None


def _unreachable(engine: PreparedEngine, user: User, obstacle: Obstacle) -> EngineError:
    remedies = ["move it to where every user may go, such as /opt or /srv", f"or open {obstacle.path}"]
    if obstacle.group is not None:
        remedies.append(f"or let engines into its group: daemon.engine_groups: [{obstacle.group}]")
    if not engine.verbatim:
        remedies.append("or write daemon.engine_user: root (engines then are not isolated)")
    return EngineError(
        f"preload failed: cannot run {engine.binary_path} as user {user.name!r}: {obstacle}",
        code="PRELOAD_FAILED",
        hint=", ".join(remedies),
        pool_id=engine.pool_id,
    )
