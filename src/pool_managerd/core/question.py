"""One request to an engine, beside those that it serves: what is sent to it, as a value; whoever asks does so over HTTP."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Question:
    """A GET of ``path`` or, with a ``body``, a POST of it as JSON."""

    path: str
    body: Mapping[str, Any] | None = None
