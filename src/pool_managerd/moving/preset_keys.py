"""Keys of presets as flags of one model: which of them count, and how the router writes them into a command."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from pool_managerd.core.redaction import masked_argv
from pool_managerd.moving.command_line import FlagOfKey, Keyed
from pool_managerd.moving.presets_ini import Entry

TRUE, FALSE = frozenset({"on", "enabled", "true", "1"}), frozenset({"off", "disabled", "false", "0"})
"""What the router takes for yes and for no."""
_NUMBER = re.compile(r"-\d+(?:\.\d+)?")


@dataclass(frozen=True, slots=True)
class Key:
    """``option`` is the one name of what the key sets, however it is written."""

    entry: Entry
    flag: Keyed | None

    @property
    def option(self) -> str:
        return self.flag.name if self.flag is not None else self.entry.key

    @property
    def is_on(self) -> bool:
        """Of a flag without a value: whether it is to be there, or its opposite."""
        value = self.entry.value
        return value not in TRUE if self.flag is not None and self.flag.negates else value not in FALSE


def counting(entries: Iterable[Entry], keyed: FlagOfKey) -> tuple[dict[str, Key], list[tuple[Entry, Entry]]]:
    """The keys of one section that count, by option, and those that do not, each with the one that does.

    Of a key that is there twice it is the last. Of several names for one option it is the last in the order of the bytes.
    """
    last: dict[str, Entry] = {}
    beaten: list[tuple[Entry, Entry]] = []
    for entry in entries:
        if (before := last.get(entry.key)) is not None:
            beaten.append((before, entry))
        last[entry.key] = entry
    found: dict[str, Key] = {}
    for entry in sorted(last.values(), key=lambda entry: entry.key.encode()):
        key = Key(entry, keyed(entry.key))
        if (other := found.get(key.option)) is not None:
            beaten.append((other.entry, entry))
        found[key.option] = key
    order = {entry.path: index for index, entry in enumerate(last.values())}
    return dict(sorted(found.items(), key=lambda item: order[item[1].entry.path])), beaten


def merged(everywhere: Mapping[str, Key], own: Mapping[str, Key]) -> list[Key]:
    """What counts for one model: its ``own`` keys, and of ``[*]`` those that it has none of."""
    return [key for option, key in everywhere.items() if option not in own] + list(own.values())


def words(key: Key) -> tuple[str, ...]:
    """The key as the words of a command, none where it says what is so without it. Raises ValueError for what cannot be moved."""
    flag, name, value = key.flag, key.entry.key, key.entry.value
    if flag is None:
        if not value or value in TRUE | FALSE:
            raise ValueError("it is not known here, nor whether it takes a value: write its flag into provisioning.flags")
        return _valued(f"--{name}", value, known=False)
    if flag.mistaken:
        raise ValueError(f"the router takes it for its opposite: write {flag.negation.lstrip('-')} = true, if you mean that")
    if flag.values > 1:
        raise ValueError("the router does not take flags of two values: write it into provisioning.flags")
    if flag.values == 0:
        word = flag.name if key.is_on else flag.negation
        return (word,) if word else ()
    if not value:
        raise ValueError("it has no value: write one, or take it out")
    return _valued(flag.name, value, known=True)


def _valued(flag: str, value: str, known: bool) -> tuple[str, ...]:
    if masked_argv([flag, value]) != [flag, value]:
        raise ValueError("it looks like a secret, and none is copied")
    if value.startswith("-") and not (known and _NUMBER.fullmatch(value)):
        return (f"{flag}={value}",)  # else it would be read as a flag
    return flag, value
