"""What the newest requests and their answers say, where that is wanted: in memory alone, and bounded in all."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

MAX_EACH = 1 << 20
_HEADERS = frozenset({
    b"accept", b"anthropic-beta", b"anthropic-version", b"content-encoding", b"content-type", b"retry-after", b"user-agent",
})  # fmt: skip
"""Others may say who somebody is."""
_MAX_HEADER_BYTES = 256
_FLAT = 4096
"""What a capture takes beside its bodies, at most."""
_UNSAID = ("", "application/octet-stream", "application/x-www-form-urlencoded")
"""Types of bodies that nobody gave a type: the last one is curl's."""
Headers = Iterable[tuple[bytes, bytes]]


class CapturedBody:
    """``size`` bytes have come. Of text the beginning is kept, as it came; of anything else nothing."""

    def __init__(self, captures: Captures, headers: Headers) -> None:
        self._captures = captures
        wanted = ((name.lower(), value[:_MAX_HEADER_BYTES]) for name, value in headers if name.lower() in _HEADERS)
        self.headers = {name.decode(): value.decode("utf-8", "replace") for name, value in wanted}
        self.size = 0
        self.kept = bytearray()
        self._is_text = self._whole = True

    def add(self, piece: bytes) -> None:
        """What came next."""
        if not self.size:
            self._is_text = self._whole = self._looks_like_text(piece)
        self.size += len(piece)
        if self._whole:
            part = piece[: self._captures.take(min(len(piece), self._captures.each - len(self.kept)))]
            self.kept += part
            self._whole = len(part) == len(piece)

    def _looks_like_text(self, begin: bytes) -> bool:
        kind = self.headers.get("content-type", "").partition(";")[0].strip().lower()
        if self.headers.get("content-encoding", "identity") != "identity":
            return False
        if kind in _UNSAID:
            return begin.lstrip()[:1] in (b"{", b"[")
        return kind.startswith("text/") or kind.endswith("json")

    def to_dict(self) -> dict[str, Any]:
        """``text`` None: it is none. ``truncated``: it is the beginning of it."""
        return {
            "headers": self.headers, "bytes": self.size, "text": self.kept.decode("utf-8", "replace") if self._is_text else None,
            "truncated": self._is_text and not self._whole,
        }  # fmt: skip


class Capture:
    """Of one request: its body, and what its client has had of the engine's answer so far (None: nothing)."""

    def __init__(self, captures: Captures, headers: Headers, body: bytes) -> None:
        self._captures = captures
        self.request = CapturedBody(captures, headers)
        self.request.add(body)
        self.answer: CapturedBody | None = None
        self.forgotten = False

    def answered(self, headers: Headers) -> None:
        """An engine answers, with these."""
        self.answer = CapturedBody(self._captures, headers)

    def passes(self, piece: bytes) -> None:
        """A part of the answer goes by."""
        if self.answer is not None:
            self.answer.add(piece)

    def over(self) -> None:
        """Its request is: it makes room where newer ones need it."""
        self._captures.over[self] = None

    def forget(self) -> None:
        """It is over, and wanted no more."""
        if self.forgotten:
            return
        self.forgotten = True
        del self._captures.over[self]
        self._captures.held -= _FLAT
        for body in filter(None, (self.request, self.answer)):
            self._captures.held -= len(body.kept)
            body.kept = bytearray()


class Captures:
    """``most_bytes`` is what they take together: the oldest that are over make room; where there are none, bodies are cut."""

    def __init__(self, most_bytes: int) -> None:
        self._most = most_bytes * 8 // 9  # what grows has room for an eighth more
        self.each = min(MAX_EACH, self._most // 16)
        self.held = 0
        self.over: dict[Capture, None] = {}
        """Oldest first."""

    def begin(self, headers: Headers, body: bytes) -> Capture | None:
        """Of a request that has come; None where there is no room for it."""
        if (taken := self.take(_FLAT)) < _FLAT:
            self.held -= taken
            return None
        return Capture(self, headers, body)

    def take(self, wanted: int) -> int:
        """So many bytes are taken, of as many as are ``wanted``."""
        while self.held + wanted > self._most and self.over:
            next(iter(self.over)).forget()
        granted = min(wanted, self._most - self.held)
        self.held += granted
        return granted
