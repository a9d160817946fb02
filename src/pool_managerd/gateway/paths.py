"""The paths that clients call: whose API each is of, and where it says which model it is for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pool_managerd.gateway.dialects import Dialect


@dataclass(frozen=True, slots=True)
class Path:
    """``form``: the body may be a multipart form. ``inner``: the path at the engine, where that is another one. ``streams``: its
    answer is a stream where that is asked for.
    """

    dialect: Dialect = Dialect.OPENAI
    form: bool = False
    inner: str | None = None
    streams: bool = True


_PLAIN = ("chat/completions", "completions", "embeddings", "responses")
_OPENAI = (*_PLAIN, "rerank", "reranking", "audio/speech", "images/generations")
_FORMS = ("audio/transcriptions", "audio/translations", "images/edits", "images/variations")
_LLAMACPP = ("infill", "completion", "embedding", "tokenize", "detokenize", "apply-template", "rerank", "reranking")
_ANTHROPIC = ("messages", "messages/count_tokens")

_WHOLE = frozenset({
    "embeddings", "embedding", "rerank", "reranking", "tokenize", "detokenize", "apply-template", "messages/count_tokens",
})  # fmt: skip


def _path(path: str, dialect: Dialect = Dialect.OPENAI, *, form: bool = False, inner: str | None = None) -> Path:
    return Path(dialect, form, inner, streams=path not in _WHOLE)


POSTS: Mapping[str, Path] = {
    **{f"/v1/{path}": _path(path) for path in _OPENAI},
    **{f"/v1/{path}": _path(path, form=True) for path in _FORMS},
    **{f"/v1/{path}": _path(path, Dialect.ANTHROPIC) for path in _ANTHROPIC},
    **{f"/{path}": _path(path) for path in _LLAMACPP},
    # Clients whose base URL has no version, or that leave it out.
    **{f"/{path}": _path(path, inner=f"/v1/{path}") for path in _PLAIN},
}
"""All are POST, with the model in the body."""
