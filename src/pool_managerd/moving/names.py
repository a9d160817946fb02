"""Ids of pools for names of models: the same where that can be one, else the nearest that is free."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping

from pool_managerd.config import is_pool_id
from pool_managerd.moving.source import Source

MAX_MODELS = 1_000
MAX_ID_CHARS = 63
MAX_NAME_CHARS = 256


class Names:
    """Every name in the file, and which pool it is: ``ids`` by model, ``aliases`` the model by alias."""

    def __init__(self, models: Collection[str], aliases: Mapping[str, str]) -> None:
        self.aliases = aliases
        taken = {model for model in models if is_pool_id(model)} | set(aliases)
        self.ids: dict[str, str] = {}
        for model in models:
            self.ids[model] = model if is_pool_id(model) else _free(_slug(model), taken)
            taken.add(self.ids[model])

    def model(self, name: str) -> str | None:
        """The model that ``name`` means, by its own name or an alias."""
        return name if name in self.ids else self.aliases.get(name)

    def free_for(self, model: str) -> Callable[[str], bool]:
        """Whether a name means no other model."""
        pools = {pool_id for other, pool_id in self.ids.items() if other != model}
        return lambda name: self.model(name) in (None, model) and name not in pools


def of_llama_swap(source: Source) -> Names:
    """Raises SpecError for a name that two models have, as llama-swap does."""
    models = source.mapping(("models",))
    if len(models) > MAX_MODELS:
        raise source.wrong(("models",), f"cannot use more than {MAX_MODELS} models")
    aliases: dict[str, str] = {}
    for model in models:
        source.mapping(("models", model))
        _take_aliases(source, model, aliases)
    _by_params(source, set(models), aliases)
    return Names(models, aliases)


def _take_aliases(source: Source, model: str, aliases: dict[str, str]) -> None:
    path = ("models", model, "aliases")
    for index, alias in enumerate(source.texts(path)):
        if alias in aliases:
            raise source.wrong((*path, index), f"cannot use the alias {alias[:80]!r} twice: {aliases[alias]!r} has it, too")
        aliases[alias] = model


def _by_params(source: Source, models: set[str], aliases: dict[str, str]) -> None:
    """The keys of setParamsByID are aliases as well."""
    for model in sorted(models):
        path = ("models", model, "filters", "setParamsByID")
        source.mapping(path[:3])
        for key in source.mapping(path):
            if key != model and key in models:
                raise source.wrong(path, f"cannot use the key {key[:80]!r}: it is another model's name")
            if aliases.setdefault(key, model) != model and key != model:
                raise source.wrong(path, f"cannot use the key {key[:80]!r}: it is an alias of {aliases[key]!r}")


def usable(name: str) -> bool:
    """Whether a name can be an alias here."""
    return 1 <= len(name) <= MAX_NAME_CHARS and name.isprintable()


def _slug(name: str) -> str:
    text = re.sub(r"\.{2,}", ".", re.sub(r"[^A-Za-z0-9._-]+", "-", name[: 4 * MAX_ID_CHARS])).strip("-._")
    return text[:MAX_ID_CHARS].rstrip("-.") or "model"


def _free(slug: str, taken: set[str]) -> str:
    number, found = 1, slug
    while found in taken:
        number += 1
        found = f"{slug[: MAX_ID_CHARS - len(str(number)) - 1]}-{number}"
    return found
