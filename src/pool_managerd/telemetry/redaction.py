"""Keeping secrets out of what is written (SEC-AUTH-5003): by key name, and by value where the value is known."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

MASK = "***"
_SECRET_KEY = re.compile(r"secret|password|passwd|authorization|api[_-]?key|credential|token", re.IGNORECASE)
# Names that only look secret: where a secret is kept, and its fingerprint. Numbers such as `tokens_per_s` pass anyway.
_HARMLESS_KEY = re.compile(r"(_file|_path|fp6|_ms|_per_s|_total)$", re.IGNORECASE)
_MAX_DEPTH = 8


def fingerprint(token: str) -> str:
    """fp6: the first six hex digits of the token's SHA-256, the only form of it that is ever logged (AUTH-1008)."""
    return hashlib.sha256(token.encode()).hexdigest()[:6]


class Redactor:
    """Masks values under secret-looking keys, and the given secrets wherever they stand in a text."""

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        # A very short secret would blank out ordinary words; such a token is refused off loopback anyway.
        self._secrets = tuple(sorted({s for s in secrets if len(s) >= 4}, key=len, reverse=True))

    def text(self, value: str) -> str:
        """``value`` with every known secret replaced."""
        for secret in self._secrets:
            if secret in value:
                value = value.replace(secret, MASK)
        return value

    def mapping(self, fields: Mapping[str, Any], depth: int = 0) -> dict[str, Any]:
        """A copy of ``fields`` that is safe to write down; nested maps and lists included."""
        return {str(key): self._field(str(key), value, depth) for key, value in fields.items()}

    def _field(self, key: str, value: Any, depth: int) -> Any:
        plain = value is None or isinstance(value, (bool, int, float))
        if isinstance(value, float) and not math.isfinite(value):
            return str(value)  # NaN and infinities are no JSON
        if not plain and _SECRET_KEY.search(key) and not _HARMLESS_KEY.search(key):
            return MASK
        return self._value(value, depth)

    def _value(self, value: Any, depth: int) -> Any:
        if isinstance(value, str):
            return self.text(value)
        if value is None or isinstance(value, (bool, int, float)):
            return value
        if depth >= _MAX_DEPTH:
            return "…"
        if isinstance(value, Mapping):
            return self.mapping(value, depth + 1)
        if isinstance(value, (list, tuple, set, frozenset)):
            return [self._value(item, depth + 1) for item in value]
        return self.text(str(value))
