"""What the files of an image are whose layers lie over each other: by the rules of the OCI image specification, writing nothing.

Archives of models that are no images are layers, too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from pool_managerd.models.archive_reader import ArchiveError, Member
from pool_managerd.models.artifact_files import is_plain
from pool_managerd.models.registry import confined

MAX_FILES = 20_000
MAX_LINKS = 8
_SHOWN = 8
_WHITEOUT, _OPAQUE = ".wh.", ".wh..wh..opq"


@dataclass(frozen=True, slots=True)
class Found:
    """``member`` of the layer in place ``layer``."""

    layer: int
    member: Member


class Layered:
    """``inside`` is the folder whose files count, "" for all. ``tops`` are names outside of it, for people."""

    def __init__(self, inside: str) -> None:
        self._inside = inside
        self._tree: dict[str, object] = {}
        self._count = 0
        self.tops: set[str] = set()

    def add(self, number: int, members: Iterable[Member]) -> None:
        """The next layer. What it removes was below it, wherever in its archive that is said. Raises ArchiveError."""
        kept = list(self._counting(members))
        for member in kept:
            folder, _, name = member.path.rpartition("/")
            if self._inside and name == _OPAQUE:
                self._remove(folder)
            elif self._inside and name.startswith(_WHITEOUT):
                self._remove(f"{folder}/{name.removeprefix(_WHITEOUT)}".lstrip("/"))
        for member in kept:
            if not (self._inside and member.path.rpartition("/")[2].startswith(_WHITEOUT)):
                self._put(number, member)

    def files(self) -> dict[str, Found]:
        """All that an engine could read, links to files included, by path below ``inside``."""
        prefix = f"{self._inside}/" if self._inside else ""
        reached = ((path, self._reach(found)) for path, found in self._walk())
        return {path.removeprefix(prefix): found for path, found in reached if found is not None}

    # --- inside ---

    def _counting(self, members: Iterable[Member]) -> Iterator[Member]:
        for member in members:
            if ".." in member.path.split("/"):
                raise ArchiveError(f"it has a file that leads out of it, {member.path[:100]!r}")
            path = confined(member.path)
            top = path.partition("/")[0]
            if self._inside and top != self._inside:
                if len(self.tops) < _SHOWN and top.isprintable() and not top.startswith(_WHITEOUT):
                    self.tops.add(top[:40])
                if not (top == _OPAQUE or (path == top and top == f"{_WHITEOUT}{self._inside}")):
                    continue
            if not is_plain(path):  # no engine asks for it
                continue
            self._count += 1
            if self._count > MAX_FILES:
                raise ArchiveError(f"it has more than {MAX_FILES} files that may be of a model")
            yield Member(member.number, path, member.kind, member.size, member.target)

    def _put(self, number: int, member: Member) -> None:
        *folders, name = member.path.split("/")
        here = self._tree
        for folder in folders:
            below = here.get(folder)
            if not isinstance(below, dict):
                below = here[folder] = {}
            here = below
        if member.kind != "folder":
            here[name] = Found(number, member)
        elif not isinstance(here.get(name), dict):
            here[name] = {}

    def _remove(self, path: str) -> None:
        if not path:
            self._tree.clear()
            return
        *folders, name = path.split("/")
        here: object = self._tree
        for folder in folders:
            here = here.get(folder) if isinstance(here, dict) else None
        if isinstance(here, dict):
            here.pop(name, None)

    def _find(self, path: str) -> object:
        here: object = self._tree
        for name in path.split("/"):
            here = here.get(name) if isinstance(here, dict) else None
        return here

    def _walk(self) -> Iterator[tuple[str, Found]]:
        left: list[tuple[str, object]] = [("", self._tree)]
        while left:
            above, here = left.pop()
            if isinstance(here, Found):
                yield above, here
            elif isinstance(here, dict):
                left += [(f"{above}/{name}" if above else name, below) for name, below in here.items()]

    def _reach(self, found: Found) -> Found | None:
        """The file that it is, or leads to; None: it leads out, or to no file."""
        for _ in range(MAX_LINKS):
            member = found.member
            if member.kind == "file":
                return found
            if member.kind not in ("symlink", "hardlink") or not member.target:
                return None
            folder = member.path.rpartition("/")[0] if member.kind == "symlink" and not member.target.startswith("/") else ""
            target = _joined(folder, member.target)
            there = None if target is None else self._find(target)
            if not isinstance(there, Found):
                return None
            found = there
        return None


def _joined(folder: str, target: str) -> str | None:
    """None: it leads out."""
    parts = folder.split("/") if folder else []
    for part in target.split("/"):
        if part == "..":
            if not parts:
                return None
            parts.pop()
        elif part not in ("", "."):
            parts.append(part)
    return "/".join(parts)
