"""The file of llama.cpp's router (``llama-server --models-preset FILE``): a section is a model, ``[*]`` is all of them, a key is
a flag without its dashes, the name of its variable, or one that the router keeps to itself. Of a key that is there twice the
last counts; a ``;`` or ``#`` ends a value wherever it stands, and quotes are part of it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from pool_managerd.config.parse import MAX_FILE_BYTES, KeyPath, key_text
from pool_managerd.errors import SpecError
from pool_managerd.moving.names import MAX_MODELS
from pool_managerd.moving.source import Source, shown, wrong

GLOBAL = "*"
"""The section whose keys every model has, unless its own says otherwise."""
VERSION = "1"
MAX_KEYS = 50_000
"""Of all models together, those of ``[*]`` counted for each."""

_LINE_END = re.compile(r"\r\n|\n|\r")
_SECTION = re.compile(r"\[([^\]]+)\][ \t]*(?:[;#].*)?", re.DOTALL)
_KEY = re.compile(r"([A-Za-z_][A-Za-z0-9_.-]*)[ \t]*=(.*)", re.DOTALL)
_WORD_END = re.compile(r"[ \t:=]")
_COMMENT = re.compile(r"[;#]")
_NAME_IT = "name the file that llama-server is started with (--models-preset FILE)"


@dataclass(frozen=True, slots=True)
class Entry:
    """One key as it is written."""

    path: KeyPath
    key: str
    value: str


@dataclass(frozen=True, slots=True)
class Presets:
    """``sections`` have their keys in the order of the file, every one; ``[*]`` is ``everywhere``. ``versions`` is where the
    file says how it is to be read.
    """

    source: Source
    sections: Mapping[str, tuple[Entry, ...]]
    everywhere: tuple[Entry, ...]
    versions: tuple[KeyPath, ...]


def named(path: KeyPath) -> str:
    """A key as people find it in the file: ``[MODEL] KEY``."""
    if path[0] != "models":
        return key_text(path)
    return f"[{path[1]}] {path[2]}" if len(path) > 2 else f"[{path[1]}]"


def read(text: str, name: str) -> Presets:
    """Raises SpecError (``CONFIG_ERROR``), which names the line, for what the router could not load either, or what it would
    take for something else than whoever wrote it.
    """
    if len(text) > MAX_FILE_BYTES:
        raise wrong(name, f"cannot read it: it is larger than {MAX_FILE_BYTES} bytes")
    reader = _Reader(name)
    for number, line in enumerate(_LINE_END.split(text), start=1):
        reader.read(number, line)
    return reader.presets()


class _Reader:
    """One pass over the lines of a file."""

    def __init__(self, name: str) -> None:
        self._source = Source(name, {}, named=named)
        self._places: dict[KeyPath, str] = {}
        self._sections: dict[str, list[Entry]] = {}
        self._section: str | None = None
        self._versions: list[KeyPath] = []

    def read(self, number: int, line: str) -> None:
        if "\0" in line:
            raise self._wrong(number, "cannot read it: it holds NUL, as no text does", _NAME_IT)
        content = line.strip(" \t")
        if not content or content[0] in ";#":
            return
        if (found := _SECTION.fullmatch(line)) is not None:
            self._open(number, found[1].strip(" \t"))
        elif (found := _KEY.fullmatch(line)) is not None:
            self._take(number, found[1], _COMMENT.split(found[2], maxsplit=1)[0].strip(" \t"))
        elif line[0] in " \t":
            raise self._wrong(number, "cannot read it: keys and sections begin their line", "take out what is before it")
        else:
            begin = shown(_WORD_END.split(content, maxsplit=1)[0])  # no more: behind it may be a secret
            raise self._wrong(number, f"cannot read {begin} …: it is no [MODEL], no KEY = VALUE and no comment", _NAME_IT)

    def _open(self, number: int, section: str) -> None:
        if not section:
            raise self._wrong(number, "cannot use a section without a name", "name the model, or [*] for all of them")
        if (before := self._places.get(("models", section))) is not None:
            line = before.rsplit(":", 2)[1]
            raise self._wrong(
                number, f"cannot use the section {shown(section)} twice: it is on line {line}, too",
                "make one of them: the router forgets the first",
            )  # fmt: skip
        if section != GLOBAL and len(self._sections.keys() - {GLOBAL}) == MAX_MODELS:
            raise self._wrong(number, f"cannot use more than {MAX_MODELS} models")
        self._section = section
        self._sections[section] = []
        self._places["models", section] = self._place(number)

    def _take(self, number: int, key: str, value: str) -> None:
        if key == "version":
            if value != VERSION:
                raise self._wrong(
                    number,
                    f"cannot read version {shown(value)} of presets: {VERSION} is the one there is",
                    f"write version = {VERSION} if the keys are flags of llama-server",
                )
            at: KeyPath = ("version",) if self._section is None else ("models", self._section, key)
            self._versions += [] if at in self._places else [at]
            self._places.setdefault(at, self._place(number))
            return
        if self._section is None:
            raise self._wrong(
                number, f"cannot use {key} before the first section",
                "write it below [*] for all models: the router makes a model of its own of it, `default`",
            )  # fmt: skip
        entries = self._sections[self._section]
        path: KeyPath = ("models", self._section, key)
        if path in self._places:
            path = (*path, number)
        self._places[path] = self._place(number)
        entries.append(Entry(path, key, value))

    def _place(self, number: int) -> str:
        return f"{self._source.name}:{number}:1"

    def _wrong(self, number: int, text: str, hint: str | None = None) -> SpecError:
        return wrong(self._place(number), text, hint)

    def presets(self) -> Presets:
        everywhere = tuple(self._sections.pop(GLOBAL, ()))
        sections = {name: tuple(entries) for name, entries in self._sections.items()}
        if not sections:
            raise wrong(self._source.name, "cannot find any models in it", _NAME_IT)
        if sum(map(len, sections.values())) + len(everywhere) * len(sections) > MAX_KEYS:
            raise wrong(self._source.name, f"cannot use more than {MAX_KEYS} keys, those of [*] counted for each model")
        self._source.places = self._places
        return Presets(self._source, sections, everywhere, tuple(self._versions))
