"""A llama-swap configuration as ours, and what became of each of its keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pool_managerd.config.parse import KeyPath
from pool_managerd.moving import top_level
from pool_managerd.moving.document import Document, Moved
from pool_managerd.moving.draft import Draft, Surroundings
from pool_managerd.moving.macros import read
from pool_managerd.moving.names import of_llama_swap
from pool_managerd.moving.pool import ModelMover
from pool_managerd.moving.report import Findings
from pool_managerd.moving.source import wrong
from pool_managerd.moving.together import Rules, RulesMover

_BIND = "llama-swap listens on :8080 of every address, unless -listen says otherwise; off loopback keys are required"


def convert(text: str, name: str, env: Mapping[str, str], around: Surroundings) -> Moved:
    """What ``text``, a llama-swap file called ``name``, says as a configuration of ours.

    Raises SpecError (``CONFIG_ERROR``), which names the line, for a file that llama-swap could not load either, or that is beyond
    what is read here.
    """
    source, used = read(text, name, env)
    if not source.mapping(("models",)):
        raise wrong(name, "cannot find any models in it", "name the YAML that llama-swap is started with (-config FILE)")
    names, findings = of_llama_swap(source), Findings(source)
    values = top_level.sections(source, findings)
    mover = ModelMover(source, findings, names, around)
    drafts = {model: draft for model in names.ids if (draft := mover.move(model)) is not None}
    top_level.selectors(source, names, drafts, findings)
    top_level.scheduler(source, findings)
    rules = RulesMover(source, findings, names, drafts).move()
    top_level.preload(source, names, drafts, rules, findings)
    top_level.macros(source, used, findings)
    findings.drop_unknown("llama-swap has no such key; take it out, or check how it is written")
    return _document(values, list(drafts.values()), rules).written(name, "llama-swap", findings)


def _document(values: dict[str, Any], drafts: list[Draft], rules: Rules) -> Document:
    for draft in drafts:
        if draft.pool_id in rules.weights and rules.weights[draft.pool_id] != 1:
            draft.fields["eviction_weight"] = rules.weights[draft.pool_id]
    notes: dict[KeyPath, list[str]] = {**rules.notes, ("gateway", "bind"): [_BIND]}
    return Document(values, drafts, {"together": rules.section} if rules.section else {}, notes)
