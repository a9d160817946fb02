"""Flags of an engine as data: which exist, how many values each takes, and their one normal form (SPEC §6.6).

Normal form: canonical names, one use per option (the last wins; of a list all are kept, in their order), sorted by name.
It does not depend on the order in which different options were written, and normalising twice changes nothing
(EP-UNIT-3105, EP-PROP-3203). Engines take underscores for hyphens in long names, so they mean the same here.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources

from pool_managerd.errors import PoolError, SpecError

MAX_FLAGS = 512
MAX_FLAG_CHARS = 8192
MANY = -1
"""Of ``Option.values``: one or more, up to the next flag."""


def hyphenated(name: str) -> str:
    """``--top_p`` as ``--top-p``: engines take either in long names. What follows a ``=`` stays as it is."""
    if not name.startswith("--"):
        return name
    flag, joined, value = name.partition("=")
    option, dot, key = flag.partition(".")
    return option.replace("_", "-") + dot + key + joined + value


@dataclass(frozen=True, slots=True)
class Option:
    """One option of an engine: ``names`` are synonyms, ``negated`` its opposites, ``values`` follow it in argv. Of a
    ``listed`` one every use counts, of others the last.
    """

    names: tuple[str, ...]
    negated: tuple[str, ...] = ()
    values: int = 0
    listed: bool = False

    @property
    def several(self) -> bool:
        """True when every use counts, not the last alone."""
        return self.listed or self.values == MANY

    @property
    def canonical(self) -> str:
        """The longest name, the first of them on a tie: ``--n-gpu-layers``, ``--ctx-size``, ``--no-webui``'s ``--webui``."""
        return max(self.names, key=len)

    def spelling(self, name: str) -> str:
        """The one name that ``name``'s side of the option is written with."""
        return max(self.negated, key=len) if name in self.negated else self.canonical


@dataclass(frozen=True, slots=True)
class FlagUse:
    """One option as used: ``name`` is its canonical spelling, negated or not. A list's ``values`` are those of all uses."""

    option: Option
    name: str
    values: tuple[str, ...] = ()

    @property
    def argv(self) -> tuple[str, ...]:
        each = self.option.values
        if not self.option.several or each < 1:
            return (self.name, *self.values)
        parts = (self.values[at : at + each] for at in range(0, len(self.values), each))
        return tuple(item for part in parts for item in (self.name, *part))


class OptionTable:
    """The options an engine knows, by name. ``aliases`` are further names that the engine itself may not know, ``lists``
    names of options of which every use counts.

    ``elsewhere`` is what the usual llama-server knows: what this one lacks of it earns a better refusal. ``dotted``: a
    key of an option's value may be set behind a dot, as ``--compilation-config.mode 3``.
    """

    def __init__(
        self,
        options: Iterable[Option],
        aliases: Mapping[str, str] | None = None,
        *,
        lists: frozenset[str] = frozenset(),
        elsewhere: OptionTable | None = None,
        dotted: bool = False,
    ) -> None:
        self.options = tuple(replace(o, listed=not lists.isdisjoint(o.names)) for o in options)
        self._dotted = dotted
        self._elsewhere = elsewhere
        self._by_name = {name: option for option in self.options for name in (*option.names, *option.negated)}
        known = self._by_name
        self._aliases = {alias: name for alias, name in (aliases or {}).items() if name in known and alias not in known}

    def __contains__(self, name: str) -> bool:
        return name in self._by_name or name in self._aliases

    def _starts_here(self, text: str) -> bool:
        """True when ``text`` is a flag that is known, however it is written."""
        return text in self or hyphenated(text.partition("=")[0]) in self

    def use(self, name: str, *values: str) -> FlagUse:
        """A use of a known option. Raises KeyError for an unknown one."""
        option = self._option(name)
        if option is None:
            raise KeyError(name)
        return FlagUse(option, option.spelling(self._aliases.get(name, name)), values)

    def _option(self, name: str) -> Option | None:
        whole, dot, key = name.partition(".")
        known = self._by_name.get(self._aliases.get(whole, whole))
        if not dot or known is None or not self._dotted:
            return self._by_name.get(self._aliases.get(name, name))
        return Option((f"{known.canonical}.{key}",), values=1) if key and known.values == 1 else None

    def names(self, use: FlagUse, name: str) -> bool:
        """True when ``use`` is the option that ``name`` names, on the same side of a negation."""
        if name not in self:
            return False
        wanted = self.use(name).name
        return use.name == wanted or use.name.startswith(f"{wanted}.")

    def refuse(self, use: FlagUse, owned: Mapping[str, str], refused: Mapping[str, str]) -> None:
        """Raises SpecError for a flag that the daemon sets (with the key to use instead) or that has a reason against it."""
        for name, key in owned.items():
            if self.names(use, name):
                raise SpecError(f"cannot set {use.name} in provisioning.flags: the daemon sets it", hint=f"use {key}")
        for name, reason in refused.items():
            if self.names(use, name):
                raise SpecError(f"cannot allow the flag {use.name}: {reason}", hint="remove it from provisioning.flags")

    def parse(self, flags: Sequence[str]) -> tuple[FlagUse, ...]:
        """Each use in ``flags``, in order. ``--name=value`` is two items. Raises SpecError naming every flag that is wrong."""
        uses, problems = self.sift(flags)
        raise_all(problems)
        return uses

    def sift(self, flags: Sequence[str]) -> tuple[tuple[FlagUse, ...], tuple[SpecError, ...]]:
        """The uses that can be read, and what is wrong with the rest: behind a wrong flag its values are left out as well."""
        if len(flags) > MAX_FLAGS or any(len(flag) > MAX_FLAG_CHARS or "\0" in flag for flag in flags):
            limits = f"at most {MAX_FLAGS}, each at most {MAX_FLAG_CHARS} characters without NUL"
            return (), (SpecError(f"cannot use these flags: {limits}"),)
        read = list(self.walk(flags))
        uses = tuple(use for use, _ in read if isinstance(use, FlagUse))
        return uses, tuple(error for error, _ in read if isinstance(error, SpecError))

    def walk(self, flags: Sequence[str], *, suggest: bool = True) -> Iterator[tuple[FlagUse | SpecError, tuple[str, ...]]]:
        """Each use, or what is wrong with it, and the items of ``flags`` that it was written as. What is meant by an unknown
        one costs a millisecond to ``suggest``.
        """
        position = 0
        while position < len(flags):
            start = position
            try:
                name, values, position = self._one(flags, position, suggest)
                yield self.use(name, *values), tuple(flags[start:position])
            except SpecError as error:
                position += 1
                while position < len(flags) and not flags[position].startswith("-"):
                    position += 1
                yield error, tuple(flags[start:position])

    def _one(self, flags: Sequence[str], position: int, suggest: bool) -> tuple[str, tuple[str, ...], int]:
        name = flags[position]
        position += 1
        given: tuple[str, ...] = ()
        if name not in self and name.startswith("-" if self._dotted else "--"):
            name = hyphenated(name)
            if "=" in name:
                name, _, value = name.partition("=")
                given = (value,)
        option = self._option(name)
        if option is None:
            raise self._unknown(name, suggest)
        least = 1 if option.values == MANY else option.values
        if len(given) > least:
            raise SpecError(f"cannot use the flag {name}={given[0]!r}: it takes no value", hint=f"write `{name}` alone")
        while len(given) < least or (option.values == MANY and position < len(flags) and self._is_value(flags[position])):
            if position >= len(flags) or self._starts_here(flags[position]):
                after = f" but is followed by {flags[position]}" if position < len(flags) else ""
                raise SpecError(
                    f"cannot use the flag {name}: it needs a value{after}", hint=f"write `{name}` and its value as two items"
                )
            given = (*given, flags[position])
            position += 1
        return name, given, position

    def _is_value(self, text: str) -> bool:
        return not text.startswith("--") and not self._starts_here(text)

    def _unknown(self, name: str, suggest: bool) -> SpecError:
        shown = name if len(name) <= 80 else name[:77] + "…"
        near = difflib.get_close_matches(name, self._by_name, n=1, cutoff=0.6) if suggest else []
        if not name.startswith("-"):
            return SpecError(
                f"cannot use {shown!r} as a flag: flags begin with a dash", hint="write a flag and its value as two items"
            )
        if self._elsewhere is not None and name in self._elsewhere:
            return SpecError(
                f"cannot use the flag {name}: the embedded engine does not take it",
                hint="use a llama-server binary (mode binary)",
            )
        suggestion = f" (did you mean {near[0]!r}?)" if near else ""
        return SpecError(
            f"cannot use the flag {shown!r}: this engine does not know it{suggestion}", hint="see the engine's --help"
        )


def recorded(file: str) -> tuple[list[Option], dict[str, str]]:
    """The options that an engine listed when it was asked for this package, and its other names for them: ``data/FILE``."""
    text = resources.files("pool_managerd.engines").joinpath("data", file).read_text(encoding="utf-8")
    rows, aliases = json.loads(text)
    return [Option(tuple(names), tuple(negated), values) for names, negated, values in rows], aliases


def raise_all(problems: Sequence[PoolError]) -> None:
    """Raises one SpecError that says all of ``problems``, with the code of the first; nothing when there is none."""
    if not problems:
        return
    first = problems[0]
    if len(problems) == 1:
        raise first
    hints = dict.fromkeys(problem.hint for problem in problems if problem.hint)
    raise SpecError(
        "; ".join(problem.message for problem in problems),
        code=first.code,
        pool_id=first.pool_id,
        hint="; ".join(hints) or None,
    )


def attempt(check: Callable[[], object]) -> tuple[PoolError, ...]:
    """What ``check`` raises, if anything."""
    try:
        check()
    except PoolError as error:
        return (error,)
    return ()


def collapse(uses: Iterable[FlagUse]) -> dict[str, FlagUse]:
    """One use per option by canonical name; the last one wins, a negation included. A list is one use with all values."""
    found: dict[str, FlagUse] = {}
    for use in uses:
        name, before = use.option.canonical, found.get(use.option.canonical)
        if before is not None and use.option.several and before.name == use.name:
            found[name] = FlagUse(use.option, use.name, before.values + use.values)
        else:
            found[name] = use
    return found


def arrange(uses: Iterable[FlagUse]) -> tuple[str, ...]:
    """argv items of ``uses``, sorted by flag name."""
    return tuple(item for use in sorted(uses, key=lambda use: use.name) for item in use.argv)
