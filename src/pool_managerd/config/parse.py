"""Configuration as text: YAML or TOML into plain values, with the place of every key and value kept for errors.

Only plain data passes: no custom tags, no duplicate keys, no alias bombs, bounded size and depth (FAULTS I11).
"""

from __future__ import annotations

import math
import os
import re
import stat
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.composer import Composer
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

MAX_FILE_BYTES = 1024 * 1024
MAX_NODES = 50_000
MAX_DEPTH = 32
MAX_DOTS = 200
MAX_PROBLEMS = 50
"""What is told of a file: the first so many. A list of a hundred thousand wrong items is one mistake, not a hundred thousand."""
MERGE = "<<"
EXTENSION = "x-"
"""What top-level keys begin with that are not ours: places for anchors, as in compose files."""

KeyPath = tuple[str | int, ...]

_TAG = "tag:yaml.org,2002:"
_PLAIN_TAGS = {f"{_TAG}{name}" for name in ("null", "bool", "int", "float", "str", "map", "seq", "timestamp", "merge", "value")}
_TOML_PLACE = re.compile(r" \(at line (\d+), column (\d+)\)$")


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong with the configuration: where it is, which key, what to do about it."""

    place: str
    key: str
    text: str

    def __str__(self) -> str:
        return ": ".join(part for part in (self.place, self.key, self.text) if part)


@dataclass(slots=True)
class Tree:
    """Plain values of one source. ``places`` says where each key path was written, as ``FILE:LINE:COLUMN``."""

    values: dict[str, Any] = field(default_factory=dict)
    places: dict[KeyPath, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


def read_bounded(path: Path) -> str:
    """The text of a regular file of at most 1 MiB. Raises ValueError with the reason."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise ValueError(f"cannot read it: {error.strerror or error}") from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise ValueError("cannot read it: it is not a regular file")
    with os.fdopen(fd, "rb") as file:
        data = file.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise ValueError(f"cannot read it: it is larger than {MAX_FILE_BYTES} bytes")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"cannot read it: byte {error.start} is not UTF-8") from error


def parse_file(path: Path) -> Tree:
    """Read ``path`` as TOML when it ends in ``.toml``, else as YAML. What is wrong is in ``Tree.problems``."""
    try:
        text = read_bounded(path)
    except ValueError as error:
        return Tree(problems=[Problem(str(path), "", str(error))])
    return parse_text(text, path)


def parse_text(text: str, path: Path) -> Tree:
    """As ``parse_file``, if ``text`` were what is in ``path``."""
    return parse_toml(text, str(path)) if path.suffix.lower() == ".toml" else parse_yaml(text, str(path))


def parse_toml(text: str, name: str) -> Tree:
    """Values of a TOML document. tomllib tells no places beyond syntax errors, so keys are named without a line."""
    for number, line in enumerate(text.splitlines(), start=1):
        if line.count(".") > MAX_DOTS:  # a key of n parts costs n² steps to read
            return Tree(problems=[Problem(f"{name}:{number}:1", "", f"cannot read it: the line has more than {MAX_DOTS} dots")])
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        message = str(error)
        found = _TOML_PLACE.search(message)
        place = f"{name}:{found[1]}:{found[2]}" if found else name
        return Tree(problems=[Problem(place, "", f"cannot read it as TOML: {_TOML_PLACE.sub('', message)}")])
    except RecursionError:
        return Tree(problems=[Problem(name, "", "cannot read it as TOML: nested too deeply")])
    own = {key: value for key, value in values.items() if not key.startswith(EXTENSION)}
    return Tree(values=own, places={(): name})


def parse_yaml(text: str, name: str) -> Tree:
    """Values of one YAML 1.2 document whose top is a mapping."""
    tree = Tree(places={(): f"{name}:1:1"})
    try:
        root = _yaml().compose(text)
        if root is None:
            tree.problems.append(Problem(f"{name}:1:1", "", "cannot use an empty file: write at least `profile: home`"))
            return tree
        value = _Walk(name, tree).value(root, ())
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name
        tree.problems.append(Problem(place, "", f"cannot read it as YAML: {error.problem or error.context}"))
        return tree
    except (YAMLError, RecursionError, ValueError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error).partition("\n")[0]
        tree.problems.append(Problem(name, "", f"cannot read it as YAML: {reason}"))
        return tree
    if isinstance(value, dict):
        tree.values = {key: part for key, part in value.items() if not key.startswith(EXTENSION)}
    elif not tree.problems:
        tree.problems.append(Problem(tree.places[()], "", "cannot use it: the top must be a mapping of sections"))
    return tree


def parse_scalar(text: str) -> Any:
    """A value given as one string: JSON-like lists and maps in brackets, else a YAML 1.2 scalar."""
    if text.lstrip()[:1] in ("[", "{"):
        tree = parse_yaml(f"value: {text}", "")
        return text if tree.problems else tree.values["value"]
    resolver = _yaml().resolver
    tag = str(resolver.resolve(ScalarNode, text, (True, False)))
    try:
        return _scalar(tag, text)
    except ValueError:
        return text


def _yaml() -> YAML:
    yaml = YAML(typ="safe", pure=True)
    yaml.Composer = _BoundedComposer
    return yaml


class _BoundedComposer(Composer):
    """Ends at the first node too many, at some fifty microseconds each, rather than at the end of the file."""

    _nodes = _depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self._nodes += 1
        if self._nodes > MAX_NODES:
            raise ValueError(f"more than {MAX_NODES} values")
        self._depth += 1
        if self._depth > MAX_DEPTH + 1:
            raise ValueError(f"nested deeper than {MAX_DEPTH}")
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1


class _Walk:
    """One pass over the node graph: values out, places and problems noted, repeated visits (aliases) counted."""

    def __init__(self, name: str, tree: Tree) -> None:
        self._name = name
        self._tree = tree
        self._visited = 0

    def value(self, node: Node, path: KeyPath) -> Any:
        self._visited += 1
        if self._visited > MAX_NODES:
            raise ValueError("too many values (aliases expanded)")
        if len(path) > MAX_DEPTH:
            raise ValueError(f"nested deeper than {MAX_DEPTH}")
        self._tree.places.setdefault(path, self._place(node))
        if str(node.tag) not in _PLAIN_TAGS:
            self._wrong(node, path, f"cannot use the tag {node.tag}: only plain values are read")
            return None
        if isinstance(node, MappingNode):
            return self._mapping(node, path)
        if isinstance(node, SequenceNode):
            return [self.value(item, (*path, index)) for index, item in enumerate(node.value)]
        try:
            return _scalar(str(node.tag), node.value)
        except ValueError as error:
            self._wrong(node, path, f"cannot use {node.value!r}: {error}")
            return None

    def _mapping(self, node: MappingNode, path: KeyPath) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key_node, value_node in self._pairs(node, path):
            key = key_node.value
            self._tree.places[(*path, key)] = self._place(key_node)
            result[key] = self.value(value_node, (*path, key))
        return result

    def _pairs(self, node: MappingNode, path: KeyPath, depth: int = 0) -> list[tuple[ScalarNode, Node]]:
        """The keys of a mapping and those that it takes over from others by ``<<``, which give way to its own."""
        own: dict[str, tuple[ScalarNode, Node]] = {}
        merged: list[Node] = []
        for key_node, value_node in node.value:
            if not isinstance(key_node, ScalarNode) or not isinstance(key_node.value, str):
                self._wrong(key_node, path, "cannot use a key that is not text")
                continue
            key = key_node.value
            if key in own:
                self._wrong(key_node, (*path, key), f"duplicate key {key!r}: it is already set at {self._place(own[key][0])}")
                continue
            own[key] = (key_node, value_node)
            if key == MERGE and key_node.style is None:
                merged = value_node.value if isinstance(value_node, SequenceNode) else [value_node]
        if merged:
            del own[MERGE]
        for other in merged:
            self._visited += 1
            if depth > MAX_DEPTH or self._visited > MAX_NODES:
                raise ValueError("too many values (aliases expanded)")
            if not isinstance(other, MappingNode):
                self._wrong(other, path, f"cannot merge it: `{MERGE}` takes a mapping, as `{MERGE}: *anchor`, or a list of them")
                continue
            pairs = self._pairs(other, path, depth + 1)
            self._visited += len(pairs)
            for taken in pairs:
                own.setdefault(taken[0].value, taken)
        return list(own.values())

    def _place(self, node: Node) -> str:
        mark = node.start_mark
        return f"{self._name}:{mark.line + 1}:{mark.column + 1}"

    def _wrong(self, node: Node, path: KeyPath, text: str) -> None:
        if len(self._tree.problems) > MAX_PROBLEMS:
            return
        self._tree.problems.append(Problem(self._place(node), key_text(path), text))


def key_text(path: KeyPath) -> str:
    """``pools[0].slots`` for ``("pools", 0, "slots")``."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def place_of(tree: Tree, path: KeyPath) -> str:
    """Where ``path`` was written, or else the nearest part of the document around it."""
    for length in range(len(path), -1, -1):
        if path[:length] in tree.places:
            return tree.places[path[:length]]
    return ""


def _integer(text: str) -> int:
    if len(text) > 25:
        raise ValueError("the number is too long")
    digits = text.lower()
    for prefix, base in (("0x", 16), ("0o", 8), ("0b", 2)):
        if digits.lstrip("+-").startswith(prefix):
            return int(digits, base)
    return int(digits)


def _number(text: str) -> float:
    number = float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    if not math.isfinite(number):
        raise ValueError("must be a finite number")
    return number


_SCALARS: dict[str, Callable[[str], Any]] = {
    f"{_TAG}null": lambda text: None,
    f"{_TAG}bool": lambda text: text.lower() == "true",
    f"{_TAG}int": _integer,
    f"{_TAG}float": _number,
}


def _scalar(tag: str, text: str) -> Any:
    # A date stays text: YAML 1.2's core schema has none, and no key of ours wants one.
    return _SCALARS.get(tag, str)(text)
