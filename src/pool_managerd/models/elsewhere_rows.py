"""What other tools have on this machine, for people: a row for each model, and why one cannot be used. Nothing is hashed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from pool_managerd.config import PolicyConfig
from pool_managerd.errors import SpecError
from pool_managerd.models.candidates import Candidate
from pool_managerd.models.elsewhere import Elsewhere
from pool_managerd.models.fetch_rules import check_network, check_scheme
from pool_managerd.models.foreign_files import ForeignFile
from pool_managerd.models.gguf import is_gguf
from pool_managerd.models.hub import HubFile
from pool_managerd.models.hub_folders import repositories_in
from pool_managerd.models.ollama import ollama_model, ollama_refs
from pool_managerd.models.places import Layout, Place
from pool_managerd.models.refs import parse_ref
from pool_managerd.models.remote import models_in

MAX_ROWS = 10_000


def rows_of(elsewhere: Elsewhere, policy: PolicyConfig) -> list[dict[str, Any]]:
    """Sorted by reference. Blocks."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for place in elsewhere.places:
        for layout in place.layouts:
            for one in _models(place, layout):
                key = (one.ref, str(one.files[0].place))
                if key not in found and len(found) < MAX_ROWS:
                    found[key] = row_of(elsewhere, policy, one)
    return sorted(found.values(), key=lambda row: (row["ref"], row["tool"]))


def row_of(elsewhere: Elsewhere, policy: PolicyConfig, found: Candidate) -> dict[str, Any]:
    """Where nobody could say what it has to be, it is named by its path."""
    first, model = found.files[0], parse_ref(found.ref)
    problem = elsewhere.objection(found)
    used = elsewhere.remembered(model)
    verified = used is not None and [file.place for file in used.files] == [str(file.place) for file in found.files]
    ref = found.ref
    try:
        check_scheme(policy, model)
        if not (found.digests or verified):
            check_network(policy, model)
    except SpecError as refusal:
        ref, problem = (ref, problem or refusal.message) if found.digests else (f"file:{first.place}", problem)
    return {
        "ref": ref, "path": str(first.place), "size_bytes": found.size_bytes, "files": len(found.files),
        "digest": used.digest if used is not None and verified else ",".join(found.digests) or None, "verified": verified,
        "source": found.source or None, "fetched_at_ms": _fetched_at_ms(first.place), "untouched": True, "tool": found.tool,
        "problem": problem or None,
    }  # fmt: skip


def _models(place: Place, layout: Layout) -> Iterator[Candidate]:
    if layout is Layout.OLLAMA:
        for ref in ollama_refs(place.root):
            with suppress(SpecError):  # it has no model that could be used here
                found = ollama_model(place.root, parse_ref(ref))
                if found is not None:
                    yield Candidate(ref, place.tool, (found.file,), notices=found.notices)
        return
    for repository, revision, there in repositories_in(place.root, layout):
        by_path = {file.path: file for file in there.files}
        for files in models_in(there.listing()).values():
            whole = _whole(files, by_path)
            ref = f"hf:{repository}{revision and '@'}{revision}/{whole[0].path}" if whole else ""
            with suppress(SpecError):
                if whole and is_gguf(str(whole[0].place)):
                    yield Candidate(parse_ref(ref).id, place.tool, whole, there.commit)


def _whole(files: list[HubFile], by_path: dict[str, ForeignFile]) -> tuple[ForeignFile, ...]:
    """All parts in their order; nothing of a model that has not all."""
    names = sorted(file.path for file in files)
    count = names[0].removesuffix(".gguf").rpartition("-of-")[2] if len(names) > 1 or "-of-" in names[0] else ""
    if count.isdigit() and len(count) == 5 and int(count) != len(names):
        return ()
    return tuple(by_path[name] for name in names)


def _fetched_at_ms(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns // 1_000_000
    except OSError:
        return 0
