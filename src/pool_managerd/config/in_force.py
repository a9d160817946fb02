"""Keys that the schema has and that nothing reads yet: whoever sets one is told, instead of relying on it."""

from __future__ import annotations

from collections.abc import Iterator

from pool_managerd.config.values import NOT_IN_FORCE, Section


def not_in_force(section: Section, path: str = "") -> Iterator[str]:
    """The paths that are set, in the file or from the environment, and have no effect in this version."""
    for name in sorted(section.model_fields_set):
        value, key = getattr(section, name), f"{path}.{name}" if path else name
        said = type(section).model_fields[name].description or ""
        if isinstance(value, Section):
            said += type(value).__doc__ or ""
        if NOT_IN_FORCE in said:
            yield key
        elif isinstance(value, Section):
            yield from not_in_force(value, key)
        elif isinstance(value, tuple):
            for index, item in enumerate(value):
                if isinstance(item, Section):
                    yield from not_in_force(item, f"{key}[{index}]")
