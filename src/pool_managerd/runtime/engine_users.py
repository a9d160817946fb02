"""Which uid a pool's engines run as when the daemon is root: one of their own per pool, as systemd's DynamicUser does.

A pool's uid is remembered by the owner of its working directory, so it stays as long as the directory does. No two
pools of a node share one, and none is used that a user database knows or that a process of somebody else runs as.
"""

from __future__ import annotations

import grp
import hashlib
import os
import pwd
import threading
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from pool_managerd.core.artifacts import PreparedEngine
from pool_managerd.errors import EngineError
from pool_managerd.runtime import procfs
from pool_managerd.runtime.files import RuntimeFiles
from pool_managerd.runtime.reach import UNPRIVILEGED, User

FALLBACK = "nobody"
_NEEDED_CAPABILITIES = {"CAP_CHOWN": 0, "CAP_KILL": 5, "CAP_SETGID": 6, "CAP_SETUID": 7}
_NEVER = frozenset({0, 65534, 65535})
_PROBES = ""  # no pool's id
_GPU_NODES = ("nvidiactl", "nvidia-uvm", "nvidia-uvm-tools", "nvidia-modeset", "nvidia[0-9]*", "nvidia-caps/*", "dri/renderD*")


@dataclass(frozen=True, slots=True)
class UserRules:
    """``user`` is written by the operator and then holds for every pool; ``groups`` are more that engines are in."""

    user: str | None = None
    uids: tuple[int, int] = (61184, 65519)
    groups: tuple[str, ...] = ()


def shared_user(rules: UserRules) -> str | None:
    """Why engines would have the daemon's own uid, in words; None when they get another."""
    if os.geteuid() != 0:
        return f"engines run as uid {os.geteuid()}, like the daemon, because only root can give them another"
    if rules.user is not None and _look_up(rules.user, None).uid == 0:
        return f"daemon.engine_user is {rules.user}"
    return None


def check_users(rules: UserRules) -> None:
    """Raises EngineError when this daemon could give engines no user at all."""
    if os.geteuid() == 0 and rules.user is None:
        _require_capabilities(rules, None)
        if not any(_is_free(uid) for uid in range(rules.uids[0], rules.uids[1] + 1)):
            _fallback(rules, None)
    elif os.geteuid() == 0 and rules.user is not None:
        _look_up(rules.user, None)


def usual_user(rules: UserRules) -> User | None:
    """Somebody who reaches what any pool's engine does; None when engines are the daemon's own user. Raises EngineError."""
    if shared_user(rules) is not None:
        return None
    user = UNPRIVILEGED if rules.user is None else _look_up(rules.user, None)
    return replace(user, groups=(*user.groups, *_named_groups(rules, None)))


class EngineUsers:
    """The users of one node's engines. Only asked when the daemon is root; may be asked from any thread."""

    def __init__(self, rules: UserRules, files: RuntimeFiles) -> None:
        self._rules = rules
        self._files = files
        self._given: dict[str, int] = {}
        self._lock = threading.Lock()

    @property
    def named(self) -> str | None:
        """The user that the operator wrote down for all pools."""
        return self._rules.user

    def of(self, engine: PreparedEngine) -> tuple[User, str | None]:
        """Whom to run ``engine`` as, and what is weaker than it should be. Raises EngineError.

        It is root only where the configuration says so and for a configured pool: what a caller submitted never is.
        """
        groups = (*_named_groups(self._rules, engine.pool_id), *_gpu_groups(engine))
        if self._rules.user is None:
            return self._own(engine.pool_id, groups)
        named = _look_up(self._rules.user, engine.pool_id)
        if named.uid == 0 and engine.verbatim:
            return self._own(engine.pool_id, groups)
        return replace(named, groups=tuple({*named.groups, *groups})), None

    def of_probes(self) -> User:
        """Whom binaries are run as that are only asked what they are: a uid that no engine has. Raises EngineError."""
        if self._rules.user is not None:
            return _look_up(self._rules.user, None)
        return self._own(_PROBES, ())[0]

    def is_own(self, pool_id: str, user: User) -> bool:
        """Whether nobody but this pool's engines runs as ``user``."""
        return self._given.get(pool_id) == user.uid

    def forget(self, pool_id: str) -> None:
        """The pool is gone, with its files: its uid may be given to another."""
        with self._lock:
            self._given.pop(pool_id, None)

    def _own(self, pool_id: str, groups: Iterable[int]) -> tuple[User, str | None]:
        _require_capabilities(self._rules, pool_id or None)
        with self._lock:
            uid = self._uid(pool_id)
            if uid is not None:
                self._given[pool_id] = uid
                return User(str(uid), uid, uid, tuple(dict.fromkeys((uid, *groups)))), None
        nobody, notice = _fallback(self._rules, pool_id or None)
        return replace(nobody, groups=tuple(dict.fromkeys((nobody.gid, *groups)))), notice

    def _uid(self, pool_id: str) -> int | None:
        """The pool's uid, a new one when it has none that is still good; None when there is none to be had."""
        others = {uid for pool, uid in self._given.items() if pool != pool_id}
        owners = self._files.workdir_owners()
        before = self._given.get(pool_id, owners.pop(pool_id, None))
        taken = others | set(owners.values())
        low, high = self._rules.uids
        if before is not None and low <= before <= high and before not in taken and _is_free(before):
            return before
        size = high - low + 1
        seed = f"{self._files.root}\0{pool_id}".encode()
        first = int.from_bytes(hashlib.blake2b(seed, digest_size=8).digest()) % size
        running = {uid for pid in procfs.pids() for uid in procfs.uids(pid)}
        candidates = (low + (first + step) % size for step in range(size))
        return next((uid for uid in candidates if uid not in taken and uid not in running and _is_free(uid)), None)


def _named_groups(rules: UserRules, pool_id: str | None) -> list[int]:
    found = []
    for name in rules.groups:
        try:
            found.append(grp.getgrnam(name).gr_gid)
        except KeyError as error:
            hint = "create the group, or take it off daemon.engine_groups"
            raise _cannot(f"there is no group {name!r}", hint, pool_id) from error
    return found


def _fallback(rules: UserRules, pool_id: str | None) -> tuple[User, str]:
    nobody = _look_up(FALLBACK, pool_id)
    problem = f"the uids {rules.uids[0]}-{rules.uids[1]} cannot be had here"
    if not (_is_mapped("uid", nobody.uid) and _is_mapped("gid", nobody.gid)):
        reason = f"{problem}, nor can user {FALLBACK!r}: this user namespace does not map them"
        hint = f"map more uids into the daemon's container, set daemon.engine_uids to mapped ones, or {_without_users(rules)}"
        raise _cannot(reason, hint, pool_id)
    return nobody, f"Engines of this node share the user {FALLBACK!r} and are not separated from each other: {problem}"


def _without_users(rules: UserRules) -> str:
    """What is left where engines can have no users of their own."""
    if rules.user is not None:
        return "configure this pool: what a request submits is never run as root"
    return "write daemon.engine_user: root, which is for configured pools only"


def _is_free(uid: int) -> bool:
    """No user or group of this number is known, and this user namespace has it."""
    if uid in _NEVER or not (_is_mapped("uid", uid) and _is_mapped("gid", uid)):
        return False
    for known in (pwd.getpwuid, grp.getgrgid):
        try:
            known(uid)
        except KeyError:
            continue
        return False
    return True


def _is_mapped(kind: str, number: int) -> bool:
    try:
        lines = Path(f"/proc/self/{kind}_map").read_text("ascii").splitlines()
    except OSError:
        return True  # a kernel without user namespaces
    ranges = ((int(first), int(size)) for first, _, size in (line.split() for line in lines))
    return any(first <= number < first + size for first, size in ranges)


def _require_capabilities(rules: UserRules, pool_id: str | None) -> None:
    """A root that may not change users would only find out between fork and exec, and could not end what it started."""
    effective = int((procfs.status(os.getpid()) or {}).get("CapEff", "f" * 16), 16)
    missing = [name for name, bit in _NEEDED_CAPABILITIES.items() if not effective >> bit & 1]
    if missing:
        hint = f"give the daemon these capabilities, or run it as an ordinary user, or {_without_users(rules)}"
        raise _cannot(f"the daemon is root without {', '.join(missing)} and can give engines no user of their own", hint, pool_id)


def _gpu_groups(engine: PreparedEngine) -> list[int]:
    """Groups that open the GPUs' device nodes where everybody else is kept out; never root's own."""
    if not engine.device_uuids and engine.device_mask is None:
        return []
    found = set()
    for pattern in _GPU_NODES:
        for node in Path("/dev").glob(pattern):
            try:
                info = node.stat()
            except OSError:
                continue
            if info.st_mode & 0o006 != 0o006 and info.st_mode & 0o060 == 0o060 and info.st_gid != 0:
                found.add(info.st_gid)
    return sorted(found)


def _look_up(name: str, pool_id: str | None) -> User:
    try:
        found = pwd.getpwnam(name)
    except KeyError as error:
        raise _cannot(
            f"there is no such user: {name!r}", "create the user, or set daemon.engine_user to one that exists", pool_id
        ) from error
    return User(name, found.pw_uid, found.pw_gid, tuple(sorted(set(os.getgrouplist(name, found.pw_gid)))))


def _cannot(reason: str, hint: str, pool_id: str | None) -> EngineError:
    return EngineError(
        f"preload failed: cannot choose the engine's user: {reason}", code="PRELOAD_FAILED", hint=hint, pool_id=pool_id
    )
