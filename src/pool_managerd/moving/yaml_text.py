"""Our configuration as YAML that people like to read: in the order given, comments above what they are about, short lists in one
line. Comments never hold control characters, and every text that YAML could take for something else is quoted.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pool_managerd.config.parse import KeyPath

WIDTH = 110
MAX_COMMENT_LINES = 40
MAX_COMMENT_CHARS = 4_000

Notes = Mapping[KeyPath, Sequence[str]]
"""Comments by the key path that they stand above; ``()`` is the head of the file."""

_PLAIN = re.compile(r"(?:-{1,2}(?=[A-Za-z])|[./](?=[A-Za-z_]))?[A-Za-z_][A-Za-z0-9_./+-]*")
_NOT_TEXT = frozenset({"null", "true", "false", "yes", "no", "on", "off", "y", "n"})
_SHORT = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\t": "\\t"}


def dump(values: Mapping[str, Any], notes: Notes) -> str:
    """``values`` (plain ones) as one YAML document."""
    lines = list(comment(notes.get((), ()), ""))
    for key, value in values.items():
        lines += _entry(key, value, (key,), "", notes)
    return "\n".join(lines) + "\n"


def comment(texts: Sequence[str], indent: str) -> Iterator[str]:
    """Each text as lines behind ``#``; what is too long is cut with a mark."""
    lines: list[str] = []
    for text in texts:
        shown = "".join(char if char.isprintable() or char in "\n\t" else "�" for char in text[:MAX_COMMENT_CHARS])
        for line in (shown + "…" * (len(text) > MAX_COMMENT_CHARS)).splitlines():
            broken = textwrap.wrap(line, WIDTH - 2, subsequent_indent="  ", break_on_hyphens=False, break_long_words=True)
            lines += broken or [""]
    if len(lines) > MAX_COMMENT_LINES:
        lines[MAX_COMMENT_LINES - 1 :] = ["…"]
    return (f"{indent}# {line}".rstrip() for line in lines)


def _entry(key: str, value: Any, path: KeyPath, indent: str, notes: Notes) -> Iterator[str]:
    yield from comment(notes.get(path, ()), indent)
    head = f"{indent}{scalar(key)}:"
    if isinstance(value, dict) and value and not _fits(head, value, path, notes):
        yield head
        for name, part in value.items():
            yield from _entry(name, part, (*path, name), indent + "  ", notes)
    elif isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
        yield head
        for index, item in enumerate(value):
            yield from _item(item, (*path, index), indent + "  ", notes)
    elif isinstance(value, list):
        yield from _listed(head, value, indent + "  ")
    else:
        yield f"{head} {flow(value)}"


def _item(item: Any, path: KeyPath, indent: str, notes: Notes) -> Iterator[str]:
    yield from comment(notes.get(path, ()), indent)
    if not isinstance(item, dict) or _fits(f"{indent}-", item, path, notes):
        yield f"{indent}- {flow(item)}"
        return
    before = f"{indent}- "
    for name, part in item.items():
        lines = list(_entry(name, part, (*path, name), indent + "  ", notes))
        first = next(i for i, line in enumerate(lines) if not line.lstrip().startswith("#"))
        if before.endswith("- "):
            lines[first] = before + lines[first][len(before) :]
        yield from lines
        before = indent + "  "


def _listed(head: str, items: Sequence[Any], indent: str) -> Iterator[str]:
    """A list of scalars in one line, or broken between its items."""
    whole = f"{head} {flow(list(items))}"
    if len(whole) <= WIDTH:
        yield whole
        return
    yield f"{head} ["
    line = indent
    for item in items:
        text = flow(item) + ","
        if line.strip() and len(line) + 1 + len(text) > WIDTH:
            yield line
            line = indent
        line += text if not line.strip() else f" {text}"
    yield line
    yield indent[2:] + "]"


def _fits(head: str, value: Mapping[str, Any], path: KeyPath, notes: Notes) -> bool:
    """Whether a mapping may stand in one line: a short one of scalars, or whatever somebody else's keys hold."""
    if any(len(at) > len(path) and at[: len(path)] == path for at in notes):
        return False
    simple = not any(isinstance(part, dict) for part in value.values())
    return simple and len(value) <= 5 and len(head) + 1 + len(flow(value)) <= WIDTH


def flow(value: Any) -> str:
    """A value in one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{scalar(key)}: {flow(part)}" for key, part in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(flow, value)) + "]"
    return scalar(value)


def scalar(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    text = str(value)
    if _PLAIN.fullmatch(text) and text.lower() not in _NOT_TEXT and len(text) <= 1_000:
        return text
    return '"' + "".join(map(_quoted, text)) + '"'


def _quoted(char: str) -> str:
    if char in _SHORT:
        return _SHORT[char]
    if char.isprintable() and char != "\ufeff":
        return char
    code = ord(char)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
