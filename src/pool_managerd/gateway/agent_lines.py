"""Lines of coding agents that differ in every request and mean nothing to the model: all that stands behind them an engine has to
read again. Claude Code sends them, and what translates its requests passes them on:

- ``x-anthropic-billing-header: cc_version=…; cc_entrypoint=…; cch=…;`` as the first block or line of the system prompt;
- ``<total_tokens>… tokens left</total_tokens>`` as a block or line of the system prompt, as a system message after a tool's
  result or a prompt, or as a block of a user's message.

Only what is all of a block, or a whole line of a system prompt, goes: what people and tools have written stays.
"""

from __future__ import annotations

import re
from typing import Any

_MARKS = (b"x-anthropic-billing-header:", b"tokens left")
_BILLING = re.compile(r"(?:x-anthropic-billing-header:[^\n]*(?:\n|\Z))+")
_TOKENS = r"[ \t]*<total_tokens>[0-9][0-9,. ]{0,20} tokens left</total_tokens>[ \t]*"
_BLOCK = re.compile(rf"\s*{_TOKENS}\s*")
_LINE = re.compile(rf"^{_TOKENS}(?:\r?\n|\Z)", re.MULTILINE)
_TEXTS = frozenset({"text", "input_text"})
_SYSTEM = frozenset({"system", "developer"})


def may_be_in(body: bytes) -> bool:
    """Whether it is worth looking for them."""
    return any(mark in body for mark in _MARKS)


def without(request: dict[str, Any]) -> dict[str, Any]:
    """``request``, of any API, without them; everything else as it is, and in its order."""
    kept: dict[str, Any] = {}
    for key, value in request.items():
        if key in ("system", "instructions"):
            if (prompt := _prompt(value, first=True)) or prompt == value:
                kept[key] = prompt
        elif key in ("messages", "input") and isinstance(value, list):
            kept[key] = _messages(value)
        else:
            kept[key] = value
    return kept


def _messages(messages: list[Any]) -> list[Any]:
    kept: list[Any] = []
    for message in messages:
        role, content = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
        left = content
        if role in _SYSTEM:
            left = _prompt(content, first=not kept)
        elif role == "user" and isinstance(content, list):
            left = [block for block in content if _BLOCK.fullmatch(_text(block)) is None] or content
        if left == content:
            kept.append(message)
        elif left:
            kept.append({**message, "content": left})
    return kept


def _prompt(content: Any, *, first: bool) -> Any:
    """A system prompt, as text or in blocks; ``first``: what it begins with is what the request begins with."""
    if isinstance(content, str):
        left = _LINE.sub("", content)
        billing = _BILLING.match(left) if first else None
        return left if billing is None else left[billing.end() :]
    if not isinstance(content, list):
        return content
    kept: list[Any] = []
    for block in content:
        text = _text(block)
        left = _prompt(text, first=first and not kept)
        if left == text:
            kept.append(block)
        elif left:
            kept.append({**block, "text": left})
    return kept


def _text(block: Any) -> str:
    """Of a block of text; empty of any other."""
    text = block.get("text") if isinstance(block, dict) and block.get("type") in _TEXTS else None
    return text if isinstance(text, str) else ""
