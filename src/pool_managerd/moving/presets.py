"""The presets of llama.cpp's router as a configuration of ours, and what became of each of their keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pool_managerd.moving.document import Document, Moved, told
from pool_managerd.moving.draft import Surroundings
from pool_managerd.moving.fates import Fates
from pool_managerd.moving.names import Names
from pool_managerd.moving.preset_keys import Key, counting, merged
from pool_managerd.moving.preset_pool import PROGRAM, SectionMover, aliases
from pool_managerd.moving.presets_ini import GLOBAL, Entry, Presets, read
from pool_managerd.moving.report import Findings, Outcome
from pool_managerd.moving.top_level import BIND

_HEAD = (
    "Not in that file, and so not here: flags on the router's own command line, which win over those of the file, and models"
    " that it finds in its cache or in --models-dir."
)
_BIND = "the router listens on 127.0.0.1:8080, unless --host or --port says otherwise; off loopback keys are required"


def convert(text: str, name: str, around: Surroundings) -> Moved:
    """What ``text``, a file of presets called ``name``, says as a configuration of ours.

    Raises SpecError (``CONFIG_ERROR``), which names the line, for a file that the router could not load either, or that is beyond
    what is read here.
    """
    presets = read(text, name)
    everywhere, beaten = counting(presets.everywhere, around.keyed)
    models: dict[str, list[Key]] = {}
    for model, entries in presets.sections.items():
        own, lost = counting(entries, around.keyed)
        models[model] = merged(everywhere, own)
        beaten += lost
    findings, fates = Findings(presets.source), Fates()
    mover = SectionMover(findings, fates, _names(presets, models), around)
    drafts = [mover.move(model, keys) for model, keys in models.items()]
    _tell(presets, fates, beaten, findings)
    values = _sections(max(mover.stops), "stop-timeout" in _options(models), findings)
    if around.find(PROGRAM) is None:
        findings.missing(PROGRAM, "it is not in the PATH of this shell: write its whole path into provisioning.binary.path")
    else:
        findings.implied(PROGRAM, "pools[].provisioning.binary.path", "the one that this shell finds")
    head = [_HEAD, *told(findings.within(("models", GLOBAL), Outcome.DROPPED))]
    return Document(values, drafts, {}, {(): head, ("gateway", "bind"): [_BIND]}).written(name, "llama-cpp-presets", findings)


def _options(models: Mapping[str, list[Key]]) -> set[str]:
    return {key.option for keys in models.values() for key in keys}


def _names(presets: Presets, models: Mapping[str, list[Key]]) -> Names:
    """Raises SpecError for a name that two models have, as the router does."""
    taken: dict[str, str] = {}
    for model, keys in models.items():
        by_option = {key.option: key for key in keys}
        for alias in aliases(by_option):
            other = alias if alias in models else taken.get(alias, model)
            if other != model:
                path, names = by_option["--alias"].entry.path, f"{alias[:80]!r} for {model[:80]!r}: {other[:80]!r} has it"
                hint = "give one of them another name: the router takes neither"
                raise presets.source.wrong(path, f"cannot use the name {names}", hint)
            taken[alias] = model
    return Names(models, taken)


def _tell(presets: Presets, fates: Fates, beaten: list[tuple[Entry, Entry]], findings: Findings) -> None:
    """A finding for every key."""
    for path in presets.versions:
        findings.needless(path, "there is one version so far")
    lost = {entry.path for entry, _ in beaten}
    for entry, winner in beaten:
        findings.needless(entry.path, f"line {presets.source.line(winner.path)} sets the same, and counts")
    for entries in (presets.everywhere, *presets.sections.values()):
        for entry in entries:
            if entry.path not in lost:
                fates.tell(entry.path, findings)


def _sections(stop_s: int, has_stop: bool, findings: Findings) -> dict[str, Any]:
    """The sections before the pools."""
    findings.implied("--host, --port", "gateway.bind", f"{BIND} here, :8080 there: set what your clients know")
    findings.implied("--models-max", "", "4 models at a time there, unless it says otherwise; here memory decides who makes room")
    found: dict[str, Any] = {"profile": "home", "gateway": {"bind": BIND}}
    if has_stop:
        found["supervision"] = {"stop_grace_ms": stop_s * 1_000}
    return found
