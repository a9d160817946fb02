"""Reading JSON that somebody else wrote: what two parsers could read differently, or what is merely big, is refused."""

from __future__ import annotations

import json
import re
from typing import Any

from pool_managerd.errors import RequestError

MAX_DEPTH = 32
MAX_INT_DIGITS = 19
# A whole string, closed or not, or one bracket. Possessive, and a quote always begins a match: no byte is read twice.
_STRING_OR_BRACKET = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|[\[\]{}]', re.DOTALL)
_QUOTE = ord('"')
_INFINITE = (float("inf"), float("-inf"))


def parse(raw: bytes) -> Any:
    """The value in ``raw``. Raises RequestError (400) for anything but plain, unambiguous UTF-8 JSON.

    Refused besides malformed text: NaN and infinities, duplicate keys, more than 32 levels, integers of more
    than 19 digits, halves of surrogate pairs.
    """
    if raw.count(b"[") + raw.count(b"{") > MAX_DEPTH and _depth(raw) > MAX_DEPTH:
        raise _refused(f"it is nested deeper than {MAX_DEPTH} levels")
    try:
        text = raw.decode("utf-8")
        value = json.loads(text, object_pairs_hook=_unique, parse_int=_int, parse_float=_float, parse_constant=_constant)
    except UnicodeDecodeError:
        raise _refused("it is not UTF-8") from None
    except json.JSONDecodeError as error:
        raise _refused(f"{error.msg} at line {error.lineno} column {error.colno}") from None
    except RecursionError:
        raise _refused(f"it is nested deeper than {MAX_DEPTH} levels") from None
    if "\\u" in text and not _encodable(value):
        raise _refused("it holds half of a surrogate pair")
    return value


def _refused(why: str) -> RequestError:
    return RequestError(
        f"cannot read the request body as JSON: {why}", code="INVALID_PARAMS", hint="send one JSON object in UTF-8"
    )


def _depth(raw: bytes) -> int:
    deepest = depth = 0
    for found in _STRING_OR_BRACKET.finditer(raw):
        first = raw[found.start()]
        if first == _QUOTE:
            continue
        depth += 1 if first in b"[{" else -1
        if depth > deepest:
            deepest = depth
            if deepest > MAX_DEPTH:
                break
    return deepest


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise _refused(f"the key {twice[:64]!r} is given twice")
    return value


def _int(digits: str) -> int:
    if len(digits.lstrip("-")) > MAX_INT_DIGITS:
        raise _refused(f"a number has more than {MAX_INT_DIGITS} digits")
    return int(digits)


def _float(digits: str) -> float:
    if len(digits) > 64 or (value := float(digits)) in _INFINITE:
        raise _refused("a number is out of range")
    return value


def _constant(name: str) -> Any:
    raise _refused(f"{name} is not JSON")


def _encodable(value: Any) -> bool:
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            return False
        return True
    if isinstance(value, dict):
        return all(_encodable(key) and _encodable(item) for key, item in value.items())
    return all(_encodable(item) for item in value) if isinstance(value, list) else True
