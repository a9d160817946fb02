"""The file that is moved over: its values, where each was written, and readers that say what is wrong with one and where."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pool_managerd.config.parse import MAX_FILE_BYTES, KeyPath, Tree, key_text, parse_yaml, place_of
from pool_managerd.errors import SpecError

MAX_SHOWN = 80
_TRUE, _FALSE = frozenset({"yes", "on", "y", "true"}), frozenset({"no", "off", "n", "false"})


def wrong(place: str, text: str, hint: str | None = None) -> SpecError:
    """The error for a file that cannot be read: nothing is written then."""
    return SpecError(f"{place}: {text}", code="CONFIG_ERROR", hint=hint)


def parsed(text: str, name: str) -> Tree:
    """The values of a YAML text. Raises SpecError (``CONFIG_ERROR``) that names each line which cannot be read."""
    if len(text) > MAX_FILE_BYTES:
        raise wrong(name, f"cannot read it: it is larger than {MAX_FILE_BYTES} bytes")
    tree = parse_yaml(text, name)
    if tree.places and not tree.values and any("empty file" in problem.text for problem in tree.problems):
        raise wrong(f"{name}:1:1", "cannot use an empty file")
    if tree.problems:
        raise SpecError("\n".join(str(problem)[:600] for problem in tree.problems), code="CONFIG_ERROR")
    return tree


def go_text(value: object) -> str:
    """A scalar as llama-swap writes it into a text."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e21:
        return str(int(value))
    return "" if value is None else str(value)


@dataclass(slots=True)
class Source:
    """``values`` have their macros expanded, ``original`` have not. ``places`` are lines of the file, ``ports`` what llama-swap
    would give each model that takes a port. ``named`` is how people find a key in the file.
    """

    name: str
    values: dict[str, Any]
    places: Mapping[KeyPath, str] = field(default_factory=dict)
    original: dict[str, Any] = field(default_factory=dict)
    ports: dict[str, int] = field(default_factory=dict)
    named: Callable[[KeyPath], str] = key_text

    def get(self, path: KeyPath, *, original: bool = False) -> Any:
        """The value at ``path``; None where there is none."""
        here: Any = self.original if original else self.values
        for part in path:
            if isinstance(here, dict):
                here = here.get(str(part))
            elif isinstance(here, list) and isinstance(part, int) and part < len(here):
                here = here[part]
            else:
                return None
        return here

    def line(self, path: KeyPath) -> int | None:
        """Where ``path`` was written, or what is around it."""
        for length in range(len(path), 0, -1):
            if (place := self.places.get(path[:length])) is not None:
                return int(place.rsplit(":", 2)[1])
        return None

    def wrong(self, path: KeyPath, text: str, hint: str | None = None) -> SpecError:
        place = place_of(Tree(places=dict(self.places)), path) or self.name
        return wrong(place, f"{self.named(path)}: {text}", hint)

    def text(self, path: KeyPath, default: str = "") -> str:
        """A text; numbers and truths are texts, too, as in llama-swap."""
        value = self.get(path)
        if isinstance(value, dict | list):
            raise self.wrong(path, "cannot use this: it must be text")
        return default if value is None else go_text(value)

    def whole(self, path: KeyPath, default: int) -> int:
        value = self.get(path)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise self.wrong(path, f"cannot use {shown(value)}: it must be a whole number")
        return default if value is None else value

    def truth(self, path: KeyPath, default: bool) -> bool:
        value = self.get(path)
        if isinstance(value, str) and value.lower() in _TRUE | _FALSE:
            return value.lower() in _TRUE
        if value is not None and not isinstance(value, bool):
            raise self.wrong(path, f"cannot use {shown(value)}: it must be true or false")
        return default if value is None else value

    def texts(self, path: KeyPath) -> list[str]:
        """A list of texts."""
        value = self.get(path)
        if value is None:
            return []
        if not isinstance(value, list) or any(isinstance(item, dict | list) for item in value):
            raise self.wrong(path, "cannot use this: it must be a list of texts")
        return [go_text(item) for item in value]

    def mapping(self, path: KeyPath) -> dict[str, Any]:
        value = self.get(path)
        if value is not None and not isinstance(value, dict):
            raise self.wrong(path, f"cannot use {shown(value)}: it must be a mapping")
        return value or {}


def shown(value: object) -> str:
    """A value as an error may show it."""
    text = "this" if isinstance(value, dict | list) else repr(value)
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 1] + "…"
