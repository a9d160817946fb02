"""What was moved over as one YAML text: the sections, the pools, and above each what was dropped of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pool_managerd.config.parse import MAX_FILE_BYTES, KeyPath, parse_yaml
from pool_managerd.moving.draft import Draft
from pool_managerd.moving.report import Finding, Findings, Outcome
from pool_managerd.moving.source import wrong
from pool_managerd.moving.yaml_text import dump


@dataclass(frozen=True, slots=True)
class Moved:
    """``text`` is our YAML."""

    text: str
    findings: tuple[Finding, ...]

    @property
    def dropped(self) -> int:
        return sum(one.outcome is Outcome.DROPPED for one in self.findings)


@dataclass(frozen=True, slots=True)
class Document:
    """``before`` are the sections above the pools, ``after`` those below, ``notes`` comments by keys of either."""

    before: Mapping[str, Any]
    drafts: Sequence[Draft]
    after: Mapping[str, Any]
    notes: Mapping[KeyPath, Sequence[str]]

    def written(self, name: str, tool: str, findings: Findings) -> Moved:
        """As the text that ``import TOOL`` makes of the file ``name``. Raises SpecError where our files may not be so large."""
        notes: dict[KeyPath, list[str]] = {path: list(lines) for path, lines in self.notes.items()}
        head = f"From {name.rpartition('/')[2]} by `pool-managerd import {tool}`."
        notes[()] = [head, *notes.get((), ()), *told(findings.elsewhere(Outcome.DROPPED))]
        for index, draft in enumerate(self.drafts):
            at: KeyPath = ("pools", index)
            if dropped := findings.within(("models", draft.model), Outcome.DROPPED):
                notes[at] = told(dropped, findings.named(("models", draft.model)))
            notes |= {(*at, *key): lines for key, lines in draft.notes.items()}
        pools = {"pools": [draft.ordered() for draft in self.drafts]} if self.drafts else {}
        text = dump({**self.before, **pools, **self.after}, notes)
        if len(text.encode("utf-8", "replace")) > MAX_FILE_BYTES or parse_yaml(text, "").problems:
            raise wrong(name, f"cannot write it as one configuration: it is beyond {MAX_FILE_BYTES} bytes, or 50000 values")
        return Moved(text, findings.all())


def told(dropped: list[Finding], prefix: str = "") -> list[str]:
    """What was dropped, for a comment; ``prefix`` is what the comment stands above."""
    return [f"dropped: {one.key.removeprefix(prefix).lstrip('. ')}: {one.why}" for one in dropped]
