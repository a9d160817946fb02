"""Repositories of the hub as other tools keep them: in its own cache, in folders, and flat. Everything blocks, and only reads."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from pool_managerd.models.foreign_files import (
    ForeignFile,
    ForeignRepository,
    foreign_file,
    is_folder,
    is_unfinished,
    names_below,
    read_small,
)
from pool_managerd.models.hub import MAX_FILES
from pool_managerd.models.places import Layout

_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_REPOSITORY = re.compile(r"models--(?P<org>[A-Za-z0-9][A-Za-z0-9._-]*?)--(?P<repo>[A-Za-z0-9][A-Za-z0-9._-]*)")
_MANIFEST = re.compile(r"manifest=(?P<org>[A-Za-z0-9._-]+)=(?P<repo>[A-Za-z0-9._-]+)=[^=/]+\.json")


def repository_in(root: Path, layout: Layout, repository: str, revision: str) -> ForeignRepository | None:
    """What ``root`` has of ``repository`` (ORG/REPO) at ``revision`` (empty: its main branch); None where it has nothing.

    Only the hub's cache knows revisions: elsewhere any file may be of any.
    """
    org, _, repo = repository.partition("/")
    if layout is Layout.HUB:
        folder = root / f"models--{org}--{repo}"
        commit = _commit(folder, revision or "main")
        return _snapshot(root, folder, commit) if commit else None
    found = _folder(root, org, repo) if layout is Layout.FOLDERS else _flat(root, f"{org}_{repo}_")
    return found if found.files else None


def blobs_in(root: Path, layout: Layout, repository: str) -> Path | None:
    """The folder of files that are called by what they contain, where something of ``repository`` may be."""
    names = {Layout.HUB: f"models--{repository.replace('/', '--')}/blobs", Layout.OLLAMA: "blobs"}
    return root / names[layout] if layout in names and is_folder(root / names[layout]) else None


def repositories_in(root: Path, layout: Layout) -> Iterator[tuple[str, str, ForeignRepository]]:
    """All of them, as (ORG/REPO, the revision to name it by, what there is)."""
    if layout is Layout.HUB:
        for name in _entries(root):
            named = _REPOSITORY.fullmatch(name)
            if named is None:
                continue
            main = _commit(root / name, "main")
            for commit in _entries(root / name / "snapshots"):
                if _COMMIT.fullmatch(commit):
                    found = _snapshot(root, root / name, commit)
                    yield f"{named['org']}/{named['repo']}", "" if commit == main else commit, found
    elif layout is Layout.FOLDERS:
        for org in filter(_NAME.fullmatch, _entries(root)):
            for repo in filter(_NAME.fullmatch, _entries(root / org)):
                yield f"{org}/{repo}", "", _folder(root, org, repo)
    elif layout is Layout.FLAT:
        for named in filter(None, map(_MANIFEST.fullmatch, _entries(root))):
            yield f"{named['org']}/{named['repo']}", "", _flat(root, f"{named['org']}_{named['repo']}_")


def _commit(folder: Path, revision: str) -> str | None:
    """The commit that a revision was when it was fetched."""
    if _COMMIT.fullmatch(revision):
        return revision if is_folder(folder / "snapshots" / revision) else None
    try:
        commit = read_small(folder / "refs" / revision, 128).decode("ascii", "replace").strip()
    except OSError:
        return None
    return commit if _COMMIT.fullmatch(commit) and is_folder(folder / "snapshots" / commit) else None


def _snapshot(root: Path, folder: Path, commit: str) -> ForeignRepository:
    """Large files are links to blobs that are called by their sha256."""
    base, blobs = folder / "snapshots" / commit, os.path.realpath(folder / "blobs")
    files = list[ForeignFile | None]()
    for path in names_below(base):
        target, name = os.path.split(os.path.realpath(base / path))
        sha256 = name if target == blobs and _SHA256.fullmatch(name) else None
        if not is_unfinished(name):
            files.append(foreign_file(path, base / path, root, sha256))
    return ForeignRepository(tuple(filter(None, files)), commit)


def _folder(root: Path, org: str, repo: str) -> ForeignRepository:
    base = root / org / repo
    return ForeignRepository(tuple(filter(None, (foreign_file(path, base / path, root) for path in names_below(base)))))


def _flat(root: Path, prefix: str) -> ForeignRepository:
    """Folders of the repository are part of the name there, behind underscores."""
    names = (name for name in _entries(root) if name.startswith(prefix) and not is_unfinished(name))
    files = (foreign_file(name.removeprefix(prefix), root / name, root) for name in names if name.isprintable())
    return ForeignRepository(tuple(filter(None, files)))


def _entries(folder: Path) -> list[str]:
    with suppress(OSError), os.scandir(folder) as entries:
        return sorted(entry.name for entry, _ in zip(entries, range(MAX_FILES), strict=False))[:MAX_FILES]
    return []
