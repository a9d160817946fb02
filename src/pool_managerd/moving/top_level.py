"""Keys of the top of a llama-swap file as sections of ours."""

from __future__ import annotations

from typing import Any

from pool_managerd.moving.draft import Draft
from pool_managerd.moving.names import Names, usable
from pool_managerd.moving.report import Findings
from pool_managerd.moving.settings import MAX_TTL_MS, idle_ttl_ms
from pool_managerd.moving.source import Source
from pool_managerd.moving.together import Rules

BIND = "127.0.0.1:8088"
KEYS_FILE = "keys.json"
LEAST_START_S = 15
"""llama-swap raises what is less."""
USUAL_STOP_S = 10
PORTS = 1_000
_LEVELS = ("debug", "info", "warn", "error")
_NEEDLESS = {
    "logTimeFormat": "every log line has its time",
    "logToStdout": "what engines print is kept apart, in bounded files: `pool-managerd logs ID`",
    "logRequests": "`pool-managerd requests` lists them", "metricsMaxInMemory": "metrics are counters, not rows",
    "ui": "there is no web page; `pool-managerd requests` lists requests by their x-request-id",
    "performance": "/metrics of the daemon has them",
    "includeAliasesInList": "lists have aliases with each model, in meta.aliases",
}  # fmt: skip
_DROPPED = {
    "store": "what was asked is kept on no disk; let Prometheus keep the metrics",
    "upstream": "any path of /upstream/MODEL starts the model: let pages stay closed that poll it",
    "profiles": "names mean the same all the time here: write `aliases` of pools, and `apply` them when they change",
    "peers": "models of other machines are not passed on: let clients ask them there, or write external pools",
}  # fmt: skip


def sections(source: Source, findings: Findings) -> dict[str, Any]:
    """The sections before the pools, and a finding for each key of the top that is not models, rules or hooks."""
    found: dict[str, Any] = {"profile": "home"}
    daemon = _ports(source, findings)
    if daemon:
        found["daemon"] = daemon
    found["gateway"] = {"bind": BIND}
    findings.implied("-listen", "gateway.bind", f"{BIND} here, :8080 there: set what your clients know")
    _keys(source, findings, found)
    _start(source, findings, found)
    _stop(source, findings, found)
    _idle(source, findings, found)
    level = source.text(("logLevel",), "info")
    if level in _LEVELS and level != "info":
        found["telemetry"] = {"log_level": level}
        findings.mapped(("logLevel",), "telemetry.log_level")
    findings.usual(("logLevel",), "info is the default" if level == "info" else "there is no such level")
    for key, why in _NEEDLESS.items():
        findings.usual((key,), why)
    for key, why in _DROPPED.items():
        findings.lost((key,), why)
    if (mib := source.whole(("captureBuffer",), 0)) > 0:
        found["gateway"]["capture_bytes"] = f"{mib}MiB"
        findings.mapped(("captureBuffer",), "gateway.capture_bytes")
    findings.usual(("captureBuffer",), "nothing is captured")
    if source.truth(("sendLoadingState",), False):
        found["gateway"]["loading_text"] = True
        findings.mapped(("sendLoadingState",), "gateway.loading_text")
    findings.usual(("sendLoadingState",), "it says nothing")
    return found


def macros(source: Source, used: set[str], findings: Findings) -> None:
    for name in source.mapping(("macros",)):
        if name in used:
            findings.mapped(("macros", name), "", "its value stands where it was used")
        else:
            findings.needless(("macros", name), "nothing uses it")
    findings.usual(("macros",), "it is empty") if not source.mapping(("macros",)) else None
    for path in source.places:
        if len(path) == 1 and str(path[0]).startswith("x-"):
            findings.usual(path, "a place for anchors: it stands where it was used")


def _ports(source: Source, findings: Findings) -> dict[str, Any]:
    start = source.whole(("startPort",), 5800)
    if ("startPort",) not in source.places:
        return {}
    if start > 65_535 - 10:
        findings.dropped(("startPort",), "there are no ports from there on: set daemon.engine_ports")
        return {}
    findings.mapped(("startPort",), "daemon.engine_ports")
    return {"engine_ports": f"{start}-{min(65_535, start + PORTS - 1)}"}


def _keys(source: Source, findings: Findings, found: dict[str, Any]) -> None:
    keys = source.texts(("apiKeys",))
    if keys:
        found["gateway"]["keys_file"] = KEYS_FILE
        why = "no key is copied: make new ones, `pool-managerd keys add NAME`, for gateway.keys_file"
        findings.dropped(("apiKeys",), why)
    findings.usual(("apiKeys",), "it is empty")


def _start(source: Source, findings: Findings, found: dict[str, Any]) -> None:
    path = ("healthCheckTimeout",)
    if path in source.places:
        found["health"] = {"startup_timeout_ms": max(LEAST_START_S, source.whole(path, 120)) * 1_000}
        findings.mapped(path, "health.startup_timeout_ms", "for a load that stands still; one that moves goes on")


def _stop(source: Source, findings: Findings, found: dict[str, Any]) -> None:
    path = ("unloadTimeout",)
    whole = source.whole(path, USUAL_STOP_S) or USUAL_STOP_S
    if whole < 0:
        raise source.wrong(path, "cannot use it: it must be 0 or more")
    own = max((source.whole(("models", model, "unloadTimeout"), 0) for model in source.mapping(("models",))), default=0)
    if path in source.places or own > 0:
        found["supervision"] = {"stop_grace_ms": max(whole, own) * 1_000}
    if path in source.places:
        findings.mapped(path, "supervision.stop_grace_ms")


def _idle(source: Source, findings: Findings, found: dict[str, Any]) -> None:
    path = ("globalTTL",)
    ttl = source.whole(path, 0)
    if ttl < 0:
        raise source.wrong(path, "cannot use it: it must be 0 or more")
    if ttl:
        found["lifecycle"] = {"idle_ttl_ms": idle_ttl_ms(ttl)}
        findings.mapped(path, "lifecycle.idle_ttl_ms", "30 days are the most" if ttl * 1_000 > MAX_TTL_MS else "")
    findings.usual(path, "0, never, is the default here, too")


def selectors(source: Source, names: Names, drafts: dict[str, Draft], findings: Findings) -> None:
    """A name for several models is an alias that they share; whichever is free first serves."""
    for name in source.mapping(("selectors",)):
        path = ("selectors", name)
        source.mapping(path)
        strategy, targets = source.text((*path, "strategy")), source.texts((*path, "targets"))
        models = [names.model(target) for target in (targets[:1] if strategy == "pin" else targets)]
        pools = [drafts[model] for model in models if model is not None and model in drafts]
        if strategy not in ("pin", "warm", "spillover") or not pools or len(pools) < len(models):
            findings.dropped(path, "it names what is no pool here: write an alias into the pools that should answer to it")
        elif not usable(name) or names.model(name) is not None or name in names.ids.values():
            findings.dropped(path, "its name cannot be an alias here")
        else:
            for pool in pools:
                pool.fields["aliases"] = list(dict.fromkeys([*pool.fields.get("aliases", []), name]))
            why = "" if strategy == "pin" else "pools share it: whichever is free first serves, and one that is down is started"
            findings.mapped(path, "pools[].aliases", why)
    if not source.mapping(("selectors",)):
        findings.usual(("selectors",), "it is empty")


def scheduler(source: Source, findings: Findings) -> None:
    path = ("routing", "scheduler")
    findings.opened(path[:1], path, ("routing", "router"), ("routing", "router", "settings"))
    use = source.text((*path, "use")) if source.mapping(path) else ""
    findings.usual((*path, "use"), "first come, first served" if use in ("", "fifo") else "llama-swap has no other than fifo")
    why = "requests for a loaded model go first, and nobody starves; acquire has a priority for each request"
    findings.lost((*path, "settings"), why)
    for empty in (path, ("routing",), ("routing", "router"), ("routing", "router", "settings")):
        if not source.get(empty):
            findings.usual(empty, "it is empty")


def preload(source: Source, names: Names, drafts: dict[str, Draft], rules: Rules, findings: Findings) -> None:
    """Pools that are preloaded; all others are started on demand."""
    path = ("hooks", "on_startup", "preload")
    source.mapping(path[:1])
    source.mapping(path[:2])
    findings.opened(path[:1], path[:2])
    chosen: list[str] = []
    for index, name in enumerate(source.texts(path)):
        model = names.model(name.strip())
        draft = drafts.get(model) if model is not None else None
        if draft is None:
            why = "no pool was made of it" if model is not None else "there is no such model; llama-swap ignores it, too"
            (findings.dropped if model is not None else findings.needless)((*path, index), why)
        elif draft.external:
            findings.needless((*path, index), "an external engine is there when somebody else starts it")
        elif other := next((one for one in chosen if one != draft.pool_id and rules.apart(one, draft.pool_id)), None):
            findings.dropped((*path, index), f"{other!r} is preloaded, and `together` keeps the two apart: it starts on demand")
        else:
            chosen.append(draft.pool_id)
            findings.mapped((*path, index), "pools[].preload")
    for draft in drafts.values():
        if not draft.external:
            draft.fields["preload"] = draft.pool_id in chosen
    for length in range(1, 4):
        if not source.get(path[:length]):
            findings.usual(path[:length], "it is empty")
