"""Configurations as they are kept: their text without the secrets, which are put back from where they still are.

In the place of each stands a word that names it (pool, and variable or flag) and tells nothing of it. A secret that was
changed since is the present one when an earlier text comes back.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pool_managerd.config.parse import parse_text
from pool_managerd.config.schema import Config
from pool_managerd.core.redaction import Redactor, is_secret_variable, named_secrets, secrets_in
from pool_managerd.errors import SpecError

_WORD = "withheld-"
_MARK = re.compile(rf"{_WORD}[0-9a-f]{{16}}")
_MOST = 10_000


def secrets_of(config: Config) -> dict[str, tuple[str, str]]:
    """By the word that stands for it, each secret of ``config``: what it is called, and its value."""
    found: dict[str, tuple[str, str]] = {}
    for pool in config.pools:
        given = pool.provisioning
        words = (*given.flags, given.url or "")
        for name, env, argv in _parts(given.env, words):
            for number, value in enumerate(_telling(env, argv)):
                digest = hashlib.sha256(f"{pool.id}\0{name}\0{number}".encode()).hexdigest()
                found[_WORD + digest[:16]] = (f"{name} of pool {pool.id}", value)
    return found


def taken_out(text: str, config: Config, path: Path) -> tuple[str, dict[str, str]] | None:
    """``text`` of ``path``, which says ``config``, without its secrets; and what each word in their place is called.

    None where that cannot be done so that the same comes back: a secret that is written in pieces or with escapes. What stands in
    keys that are no secret as well (a folder, a name) is none, whatever variable has it.
    """
    known, before = secrets_of(config), parse_text(text, path)
    values = {word: value for word, (_, value) in known.items()}
    kept = _replaced(text, values)
    while ordinary := {word for word in _outside(parse_text(kept, path).values) if word in values}:
        values = {word: value for word, value in values.items() if word not in ordinary}
        kept = _replaced(text, values)
    after = parse_text(kept, path)
    same = not after.problems and _put_back(after.values, values) == before.values
    if not same or _holds(after.values, set(values.values())) or (kept == text and _MARK.search(text)):
        return None
    return kept, {word: known[word][0] for word in _MARK.findall(kept)}


def restored(text: str, called: Mapping[str, str], known: Mapping[str, str], path: Path) -> str:
    """``text``, as it was kept for ``path``, with the secrets of ``known`` (by word) in their places. ``called`` are their names.

    Raises SpecError (CONFIG_ERROR) for one that is not known any more, or that cannot stand where the one before it stood.
    """
    lost = sorted({called.get(word, "a secret") for word in _MARK.findall(text) if word not in known})
    if lost:
        raise SpecError(
            f"cannot bring it back: what was secret in it is not kept, and is not in the file any more: {', '.join(lost)}",
            code="CONFIG_ERROR", hint="write it into the file again, by hand",
        )  # fmt: skip
    new = put_back(text, known)
    if parse_text(new, path).values != _put_back(parse_text(text, path).values, known):
        raise SpecError(
            "cannot bring it back: a secret was changed since to one that is written in another way", code="CONFIG_ERROR",
            hint="write it into the file by hand",
        )  # fmt: skip
    return new


def put_back(text: str, known: Mapping[str, str]) -> str:
    """``text`` with the secrets of ``known`` (by word) in their places, those that are known."""
    return _MARK.sub(lambda found: known.get(found[0], found[0]), text)


def _replaced(text: str, values: Mapping[str, str]) -> str:
    for word, value in sorted(values.items(), key=lambda item: (-len(item[1]), item[0])):
        text = text.replace(value, word)
    return text


def _outside(values: Any, path: tuple[Any, ...] = ()) -> Iterator[str]:
    """The words that stand where nothing is secret."""
    if isinstance(values, dict):
        for key, part in values.items():
            yield from _MARK.findall(str(key))
            yield from _outside(part, (*path, key))
    elif isinstance(values, list):
        for number, part in enumerate(values):
            yield from _outside(part, (*path, number))
    elif isinstance(values, str) and not _may_be_secret(path):
        yield from _MARK.findall(values)


def _may_be_secret(path: tuple[Any, ...]) -> bool:
    if path[:1] != ("pools",) or path[2:3] != ("provisioning",):
        return False
    return path[3] in ("flags", "url") or (path[3] == "env" and len(path) == 5 and is_secret_variable(str(path[4])))


def _parts(env: Mapping[str, str], words: tuple[str, ...]) -> Iterator[tuple[str, dict[str, str], tuple[str, ...]]]:
    """Each variable by itself, then the flags: a word names what it stands for, whatever else is added beside it."""
    for name, value in env.items():
        yield name, {name: value}, ()
    yield ", ".join(named_secrets({}, words)) or "an argument", {}, words


def _telling(env: Mapping[str, str], words: tuple[str, ...]) -> list[str]:
    """In a steady order. What is too short or too ordinary to be hidden anywhere is not hidden here either."""
    found = Redactor()
    found.know("", secrets_in(env, words))
    telling = set(found.known("", _MOST))
    texts = [*env.values(), *words]
    return sorted(telling, key=lambda value: (_first(texts, value), -len(value), value))


def _first(texts: list[str], value: str) -> tuple[int, int]:
    return next(((number, text.index(value)) for number, text in enumerate(texts) if value in text), (len(texts), 0))


def _put_back(value: Any, known: Mapping[str, str]) -> Any:
    if isinstance(value, dict):
        return {put_back(str(key), known): _put_back(part, known) for key, part in value.items()}
    if isinstance(value, list):
        return [_put_back(part, known) for part in value]
    return put_back(value, known) if isinstance(value, str) else value


def _holds(value: Any, secrets: set[str]) -> bool:
    if isinstance(value, dict):
        return any(_holds(part, secrets) for item in value.items() for part in item)
    if isinstance(value, list):
        return any(_holds(part, secrets) for part in value)
    return isinstance(value, str) and any(secret in value for secret in secrets)
