"""The expressions of llama-swap's matrix: which models may be loaded together, as the list of sets that they stand for.

``a & b`` is both, ``a | b`` one of them, ``+name`` another set's expression, parentheses group; ``&`` binds closer than ``|``.
llama-swap never writes the sets out. Here they are written out, so their number is bounded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

MAX_SETS = 1_000
MAX_NAMES = 10_000
"""In all sets together."""
MAX_STEPS = 500_000
MAX_NESTING = 50
MAX_TOKENS = 10_000

Resolve = Callable[[str], str | None]
Sets = dict[frozenset[str], None]
"""Each set once, in the order of the expression."""


class TooManyError(ValueError):
    """The expressions stand for more sets than a file should hold."""


@dataclass(frozen=True, slots=True)
class Node:
    """``kind``: ``name`` (of a model), ``ref`` (to another set), ``and``, ``or``."""

    kind: str
    name: str = ""
    parts: tuple[Node, ...] = ()


def expanded(expressions: Mapping[str, str], resolve: Resolve) -> list[tuple[str, frozenset[str]]]:
    """The sets of all ``expressions``, each once, with the name of the first that has it; what a set refers to comes before it.

    ``resolve`` says which model a name means. Raises ValueError, with the name of the set, and TooManyError.
    """
    if len(expressions) > MAX_SETS:
        raise TooManyError(f"there are more than {MAX_SETS}")
    trees = {name: _named(name, text) for name, text in expressions.items()}
    order: list[str] = []
    for name in trees:
        _visit(name, trees, order, ())
    writer = _Writer(resolve)
    found: dict[frozenset[str], str] = {}
    for name in order:
        try:
            writer.done[name] = writer.sets(trees[name])
        except TooManyError:
            raise
        except ValueError as error:
            raise ValueError(f"set {name!r}: {error}") from None
        for one in writer.done[name]:
            found.setdefault(one, name)
        _bounded(found)
    return [(name, one) for one, name in found.items()]


def _named(name: str, text: str) -> Node:
    try:
        return parse(text)
    except ValueError as error:
        raise ValueError(f"set {name!r}: {error}") from None


def parse(text: str) -> Node:
    """The tree of an expression. Raises ValueError that says what is wrong, and at which sign."""
    tokens = _tokens(text)
    if not tokens:
        raise ValueError("the expression is empty")
    node, at = _either(tokens, 0, 0)
    if at < len(tokens):
        raise _unexpected(tokens, at)
    return node


def _tokens(text: str) -> list[tuple[str, int]]:
    """Names, references with their ``+``, and signs, each with its place."""
    tokens: list[tuple[str, int]] = []
    at = 0
    while at < len(text):
        char, begin = text[at], at
        at += 1
        if char.isspace():
            continue
        if char not in "&|()":
            if char != "+" and not _in_name(char):
                raise ValueError(f"{char!r} at sign {begin + 1} is neither a name nor one of & | ( ) +")
            while at < len(text) and _in_name(text[at]):
                at += 1
            if text[begin:at] == "+":
                raise ValueError(f"the + at sign {begin + 1} has no name of a set behind it")
        tokens.append((text[begin:at], begin + 1))
        if len(tokens) > MAX_TOKENS:
            raise ValueError(f"the expression has more than {MAX_TOKENS} names and signs")
    return tokens


def _in_name(char: str) -> bool:
    return char.isalpha() or char.isdecimal() or char in "_-."


def _either(tokens: list[tuple[str, int]], at: int, depth: int) -> tuple[Node, int]:
    return _chain(tokens, at, depth, "|", "or", _both)


def _both(tokens: list[tuple[str, int]], at: int, depth: int) -> tuple[Node, int]:
    return _chain(tokens, at, depth, "&", "and", _atom)


_Part = Callable[[list[tuple[str, int]], int, int], tuple[Node, int]]


def _chain(tokens: list[tuple[str, int]], at: int, depth: int, sign: str, kind: str, part: _Part) -> tuple[Node, int]:
    node, at = part(tokens, at, depth)
    parts = [node]
    while at < len(tokens) and tokens[at][0] == sign:
        node, at = part(tokens, at + 1, depth)
        parts.append(node)
    return (Node(kind, parts=tuple(parts)) if len(parts) > 1 else node), at


def _atom(tokens: list[tuple[str, int]], at: int, depth: int) -> tuple[Node, int]:
    if depth > MAX_NESTING:
        raise ValueError(f"parentheses are nested deeper than {MAX_NESTING}")
    if at >= len(tokens) or tokens[at][0] in ("&", "|", ")"):
        raise _unexpected(tokens, at)
    text = tokens[at][0]
    if text == "(":
        node, end = _either(tokens, at + 1, depth + 1)
        if end >= len(tokens) or tokens[end][0] != ")":
            raise ValueError(f"the ( at sign {tokens[at][1]} is not closed")
        return node, end + 1
    return (Node("ref", text[1:]) if text.startswith("+") else Node("name", text)), at + 1


def _unexpected(tokens: list[tuple[str, int]], at: int) -> ValueError:
    if at >= len(tokens):
        return ValueError("the expression ends where a name should be")
    return ValueError(f"{tokens[at][0]!r} at sign {tokens[at][1]} is not expected there")


def _visit(name: str, trees: Mapping[str, Node], order: list[str], way: tuple[str, ...]) -> None:
    if name in order:
        return
    if name in way or len(way) > MAX_NESTING:
        raise ValueError(f"set {name!r}: " + ("it refers to itself" if name in way else "sets refer to each other too deeply"))
    for ref in _refs(trees[name]):
        if ref not in trees:
            raise ValueError(f"set {name!r}: there is no set {ref!r} (+{ref})")
        _visit(ref, trees, order, (*way, name))
    order.append(name)


def _refs(node: Node) -> dict[str, None]:
    if node.kind == "ref":
        return {node.name: None}
    return {name: None for part in node.parts for name in _refs(part)}


class _Writer:
    """Writes expressions out. ``done`` are the sets that others may refer to."""

    def __init__(self, resolve: Resolve) -> None:
        self._resolve = resolve
        self.done: dict[str, Sets] = {}
        self._left = MAX_STEPS

    def sets(self, node: Node) -> Sets:
        if node.kind == "ref":
            return self.done[node.name]
        if node.kind == "name":
            model = self._resolve(node.name)
            if model is None:
                raise ValueError(f"there is no model or var {node.name!r}")
            return {frozenset({model}): None}
        found: Sets = {} if node.kind == "or" else {frozenset(): None}
        for part in node.parts:
            other = self.sets(part)
            self._left -= len(other) if node.kind == "or" else len(found) * len(other)
            if self._left < 0:
                raise TooManyError(f"they stand for more than {MAX_SETS} sets")
            found = found | other if node.kind == "or" else {left | right: None for left in found for right in other}
            _bounded(found)
        return found


def _bounded(found: Mapping[frozenset[str], object]) -> None:
    if len(found) > MAX_SETS or sum(map(len, found)) > MAX_NAMES:
        raise TooManyError(f"they stand for more than {MAX_SETS} sets, or {MAX_NAMES} names in them")
