"""Why a start could not bring a model here, and what there is instead."""

from __future__ import annotations

import os
from pathlib import Path

from pool_managerd.config import PolicyConfig
from pool_managerd.errors import NodeError, PoolError, SpecError
from pool_managerd.models.elsewhere import Elsewhere
from pool_managerd.models.fetch_rules import check_network
from pool_managerd.models.ollama import ollama_refs
from pool_managerd.models.places import Layout
from pool_managerd.models.refs import ModelRef

_SHOWN = 20


def require_fetchable(model: ModelRef, elsewhere: Elsewhere, policy: PolicyConfig) -> None:
    """Of a model that is neither in the cache nor used elsewhere. Blocks. Raises PoolError where no start could fetch it."""
    if model.scheme == "local":
        raise SpecError(
            f"cannot use {model.id}: nothing was imported by that name", status=422,
            hint=f"pool-managerd models import FILE --as {model.id}; pool-managerd models ls shows what is there",
        )  # fmt: skip
    try:
        if model.scheme == "ollama":
            raise ollama_has_not(model, elsewhere)
        check_network(policy, model)
    except PoolError as problem:
        raise elsewhere.search(model).told_with(problem) from None


def ollama_has_not(model: ModelRef, elsewhere: Elsewhere) -> NodeError:
    """With where its models were looked for, and what is there. Blocks."""
    return NodeError(
        f"cannot use {model.id}: models of Ollama are used where it has them, and never fetched", code="POOL_UNREADY",
        hint=f"{_what_ollama_has(elsewhere)}; to have it: ollama pull {model.id.removeprefix('ollama:')}", retriable=False,
    )  # fmt: skip


def _what_ollama_has(elsewhere: Elsewhere) -> str:
    ollama = [place for place in elsewhere.places if Layout.OLLAMA in place.layouts]
    if not ollama:
        return "models.elsewhere names no place of Ollama's: add ollama, or the directory itself"
    told = list[str]()
    for place in ollama:
        refs = list(ollama_refs(place.root))
        more = f" and {len(refs) - _SHOWN} more" if len(refs) > _SHOWN else ""
        told.append(f"{place.root} ({', '.join(refs[:_SHOWN]) + more if refs else _why_nothing(place.root)})")
    return f"looked in {'; '.join(told)}"


def _why_nothing(root: Path) -> str:
    return "nothing that the daemon could see" if os.path.lexists(root) else "there is no such directory"
