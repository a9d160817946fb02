"""The digests that a configuration says a model must have: one, or one for each part."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from pool_managerd.errors import SpecError

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


def given_digests(given: str | Sequence[str] | None) -> tuple[str, ...]:
    """As ``sha256:<hex>`` in lower case. Raises SpecError for what is none."""
    digests = () if given is None else (given,) if isinstance(given, str) else tuple(given)
    normal = tuple(digest.strip().lower() for digest in digests)
    for digest in normal:
        if not _DIGEST.fullmatch(digest):
            raise SpecError(f"cannot use {digest[:80]!r} as a digest: it must be sha256: and 64 hexadecimal digits")
    return normal


def not_for_each_part(path: Path, parts: int, given: int) -> SpecError:
    """Of a model that has ``parts`` files, and another number of digests."""
    pattern = path.name.replace("-00001-of-", "-*-of-")
    what = f"the model is split into {parts} parts" if parts > 1 else "the model is one file"
    hint = f"list one per part, in their order: sha256sum {pattern}" if parts > 1 else "give one checksum"
    return SpecError(
        f"cannot verify {path}: {what}, and provisioning.model.checksum has {given} digest{'s' if given > 1 else ''}", hint=hint
    )
