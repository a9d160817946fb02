"""A llama-swap configuration as ours, and what became of each of its keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pool_managerd.config.parse import MAX_FILE_BYTES, KeyPath, parse_yaml
from pool_managerd.moving import top_level
from pool_managerd.moving.macros import read
from pool_managerd.moving.names import Names
from pool_managerd.moving.pool import Draft, ModelMover, Surroundings
from pool_managerd.moving.report import Finding, Findings, Outcome
from pool_managerd.moving.source import wrong
from pool_managerd.moving.together import Rules, RulesMover
from pool_managerd.moving.yaml_text import dump


@dataclass(frozen=True, slots=True)
class Moved:
    """``text`` is our YAML."""

    text: str
    findings: tuple[Finding, ...]

    @property
    def dropped(self) -> int:
        return sum(one.outcome is Outcome.DROPPED for one in self.findings)


def convert(text: str, name: str, env: Mapping[str, str], around: Surroundings) -> Moved:
    """What ``text``, a llama-swap file called ``name``, says as a configuration of ours.

    Raises SpecError (``CONFIG_ERROR``), which names the line, for a file that llama-swap could not load either, or that is beyond
    what is read here.
    """
    source, used = read(text, name, env)
    if not source.mapping(("models",)):
        raise wrong(name, "cannot find any models in it", "name the YAML that llama-swap is started with (-config FILE)")
    names, findings = Names(source), Findings(source)
    values = top_level.sections(source, findings)
    mover = ModelMover(source, findings, names, around)
    drafts = {model: draft for model in names.ids if (draft := mover.move(model)) is not None}
    top_level.selectors(source, names, drafts, findings)
    top_level.scheduler(source, findings)
    rules = RulesMover(source, findings, names, drafts).move()
    top_level.preload(source, names, drafts, rules, findings)
    top_level.macros(source, used, findings)
    findings.drop_unknown()
    written = _written(name, values, list(drafts.values()), rules, findings)
    return Moved(written, findings.all())


def _written(name: str, values: dict[str, Any], drafts: list[Draft], rules: Rules, findings: Findings) -> str:
    notes: dict[KeyPath, list[str]] = {**rules.notes}
    shown = name.rpartition("/")[2]
    notes[()] = [f"From {shown} by `pool-managerd import llama-swap`.", *_told(findings.elsewhere(Outcome.DROPPED))]
    notes["gateway", "bind"] = [
        "llama-swap listens on :8080 of every address, unless -listen says otherwise; off loopback keys are required"
    ]
    pools: list[dict[str, Any]] = []
    for draft in drafts:
        at: KeyPath = ("pools", len(pools))
        if draft.pool_id in rules.weights and rules.weights[draft.pool_id] != 1:
            draft.fields["eviction_weight"] = rules.weights[draft.pool_id]
        if dropped := findings.within(("models", draft.model), Outcome.DROPPED):
            notes[at] = _told(dropped, f"models.{draft.model}.")
        notes |= {(*at, *key): lines for key, lines in draft.notes.items()}
        pools.append(draft.ordered())
    if pools:
        values["pools"] = pools
    if rules.section:
        values["together"] = rules.section
    text = dump(values, notes)
    if len(text.encode("utf-8", "replace")) > MAX_FILE_BYTES or parse_yaml(text, "").problems:
        raise wrong(name, f"cannot write it as one configuration: it is beyond {MAX_FILE_BYTES} bytes, or 50000 values")
    return text


def _told(dropped: list[Finding], prefix: str = "") -> list[str]:
    return [f"dropped: {one.key.removeprefix(prefix)}: {one.why}" for one in dropped]
