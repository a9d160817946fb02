"""Whether a user without capabilities can reach a file: a walk over mode bits that changes nothing.

Access control lists and security modules are not read: they can only make this answer too strict or too lenient,
and then the exec step tells the truth.
"""

from __future__ import annotations

import grp
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

_MAX_LINKS = 40
READ, ENTER = 4, 1


@dataclass(frozen=True, slots=True)
class User:
    """Whom an engine runs as. ``groups`` includes ``gid``."""

    name: str
    uid: int
    gid: int
    groups: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        """What an order says of it."""
        return {"uid": self.uid, "gid": self.gid, "groups": [gid for gid in self.groups if gid != self.gid]}


UNPRIVILEGED = User("61184", 61184, 61184, (61184,))
"""A user to whom nothing belongs: what it reaches, every engine does."""


@dataclass(frozen=True, slots=True)
class Need:
    """A path and what must be possible with it: bits of READ and ENTER (which is also execute)."""

    path: str
    bits: int


@dataclass(frozen=True, slots=True)
class Obstacle:
    """The first place on the way to ``wanted`` where the user is turned away, and why.

    ``group`` is whom it would let in, None when it lets no group in, or only root's.
    """

    wanted: str
    path: str
    reason: str
    group: str | None = None

    def __str__(self) -> str:
        way = "" if self.path == self.wanted else f" (on the way to {self.wanted})"
        return f"{self.path} {self.reason}{way}"


def first_obstacle(needs: Iterable[Need], user: User) -> Obstacle | None:
    """What keeps ``user`` from the first of ``needs`` that is out of reach; None when all are within."""
    return next((found for need in needs if (found := _walk(need, user)) is not None), None)


def _walk(need: Need, user: User) -> Obstacle | None:
    wanted = os.path.abspath(need.path) if not os.path.isabs(need.path) else need.path
    pending = [part for part in reversed(wanted.split("/")) if part not in ("", ".")]
    here, links = "/", 0
    while pending:
        if (refused := _refusal(here, user, ENTER)) is not None:
            return Obstacle(wanted, here, refused, _group(here, ENTER))
        part = pending.pop()
        if part == "..":
            here = os.path.dirname(here)
            continue
        following = os.path.join(here, part)
        try:
            target = os.readlink(following) if os.path.islink(following) else None
        except OSError:
            target = None
        if target is None:
            here = following
            continue
        links += 1
        if links > _MAX_LINKS:
            return Obstacle(wanted, following, "is a loop of links")
        here = "/" if target.startswith("/") else here
        pending += [name for name in reversed(target.split("/")) if name not in ("", ".")]
    refused = _refusal(here, user, need.bits)
    return None if refused is None else Obstacle(wanted, here, refused, _group(here, need.bits))


def _group(path: str, bits: int) -> str | None:
    try:
        info = os.stat(path, follow_symlinks=False)
        return grp.getgrgid(info.st_gid).gr_name if info.st_gid and info.st_mode >> 3 & bits == bits else None
    except (OSError, KeyError):
        return None


def _refusal(path: str, user: User, bits: int) -> str | None:
    try:
        found = os.stat(path, follow_symlinks=False)
    except (FileNotFoundError, NotADirectoryError):
        return None  # what is missing is not forbidden; whoever needs it says so better
    except OSError as error:
        return f"cannot be looked at: {error.strerror}"
    mode = stat.S_IMODE(found.st_mode)
    if user.uid == found.st_uid:
        granted = mode >> 6
    elif found.st_gid in user.groups:
        granted = mode >> 3
    else:
        granted = mode
    if granted & bits == bits:
        return None
    verb = "may not be entered" if stat.S_ISDIR(found.st_mode) else "may not be executed" if bits & ENTER else "may not be read"
    return f"{verb} by user {user.name!r} (mode {mode:04o}, owner uid {found.st_uid})"
