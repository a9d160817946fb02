"""What decides llama-server's memory in its command line."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from types import MappingProxyType

from pool_managerd.core.memory.llamacpp_buffers import EngineSettings
from pool_managerd.core.memory.tensor_places import EXPERTS, PlaceRule, first_layers, readable
from pool_managerd.engines.adapter import LaunchMemory
from pool_managerd.engines.flags import OptionTable, hyphenated, recorded
from pool_managerd.engines.llamacpp.options import RECORDED

MAX_COUNT = 1 << 40
MAX_RULES = 64

AUTO_PARALLEL = 4
"""Slots that llama-server chooses by itself; they then share one cache."""

FIRST_BUILD_WITH_FEW_LOGITS = 9_450
"""From about here on llama-server reserves logits for its slots only, not for a whole micro-batch."""

OLD_NAMES: Mapping[str, str] = MappingProxyType(dict.fromkeys(("--draft", "--draft-n", "--draft-max"), "--spec-draft-n-max"))
"""Names that older builds take, and what they mean."""

UNMODELLED = frozenset({
    "--override-kv", "--no-mmproj-offload", "--image-max-tokens", "--mtmd-batch-max-tokens", "--spec-draft-override-tensor",
    "--spec-draft-cpu-moe", "--spec-draft-n-cpu-moe", "--n-gpu-layers-draft", "--spec-draft-device",
    "-cd", "--ctx-size-draft", "--spec-draft-ctx-size",
    "--rpc", "--no-host", "--defrag-thold",
    "--model-vocoder",
})  # fmt: skip
"""Flags that change how much memory is used, or where, and that the estimate does not follow: it says so."""

_SNAPSHOT_TYPES = frozenset({"draft-mtp", "draft-eagle3", "draft-dflash", "draft-dspark"})
"""Kinds of speculation that keep a copy of a recurrent state for every drafted token, to go back to."""

_DRAFT_TOKENS = 3
_BUILD = re.compile(r"(?:^|[-_ ])b(\d{2,6})(?!\w)", re.ASCII)
_IN_RAM = re.compile(r"CPU(?:_\w+)?|\w+_Host")


@dataclass(slots=True)
class _Scanned:
    """What a command line says, as text by the longest name of each option."""

    every: dict[str, list[str]] = field(default_factory=dict)
    switches: dict[str, bool] = field(default_factory=dict)
    unmodelled: dict[str, None] = field(default_factory=dict)

    @property
    def values(self) -> dict[str, str]:
        """The last use of each flag, which counts where not every use does."""
        return {key: uses[-1] for key, uses in self.every.items()}


def settings_of(flags: Sequence[str], *, version: str = "") -> LaunchMemory:
    """Read a launch's argv (without the binary). The last use of a flag wins; what it does not know it passes over.

    ``version`` is what the engine calls itself: old builds need more. Values that are no values are left at
    the engine's default: whether they are allowed is decided elsewhere.
    """
    found, build = _scan(flags), build_of(version)
    values, switches = found.values, found.switches
    parallel = _number(values, "--parallel", -1)
    auto = parallel < 1
    batch, ubatch = _number(values, "--batch-size", 2_048), _number(values, "--ubatch-size", 512)
    rules, cache_ram = _rules(found), _number(values, "--cache-ram", 8_192)
    if _snapshots(values) and "--spec-draft-model" not in values:
        found.unmodelled[f"--spec-type {values['--spec-type'][:80]}: a context of its own"] = None
    if values.get("--split-mode", "layer") in ("row", "tensor"):
        found.unmodelled["--split-mode " + values["--split-mode"]] = None
    settings = EngineSettings(
        ctx=max(0, _number(values, "--ctx-size", 0)),
        parallel=AUTO_PARALLEL if auto else parallel,
        cache_type_k=values.get("--cache-type-k", "f16"),
        cache_type_v=values.get("--cache-type-v", "f16"),
        ubatch=max(1, min(batch, ubatch) if batch > 0 and ubatch > 0 else ubatch or batch),
        flash_attn=values.get("--flash-attn", "auto").lower() not in ("off", "0", "false", "disabled"),
        kv_unified=switches.get("--kv-unified", auto),
        kv_on_gpu=switches.get("--kv-offload", True),
        swa_full=switches.get("--swa-full", False),
        gpu_layers=0 if values.get("--device", "").lower() in ("none", "cpu") else _layers(values.get("--n-gpu-layers")),
        cache_ram_bytes=None if cache_ram < 0 else cache_ram << 20,
        all_logits=build is not None and 1 < build < FIRST_BUILD_WITH_FEW_LOGITS,
        draft_cache_type_k=values.get("--cache-type-k-draft", "f16"),
        draft_cache_type_v=values.get("--cache-type-v-draft", "f16"),
        state_copies=1 + _snapshots(values),
        rules=rules,
        only_device=_only_device(values),
        shares=_shares(values.get("--tensor-split", "")),
        unmodelled=tuple(found.unmodelled),
    )
    return LaunchMemory(settings, tuple(_files(found)), values.get("--spec-draft-model"))


def build_of(version: str) -> int | None:
    """llama.cpp's build number in ``llamacpp-b9272-571d0d5`` or the like; None where it tells none."""
    found = _BUILD.search(version)
    return int(found[1]) if found else None


@cache
def _table() -> OptionTable:
    return OptionTable(recorded(RECORDED)[0], OLD_NAMES)


def _scan(flags: Sequence[str]) -> _Scanned:
    found, table = _Scanned(), _table()
    position = 0
    while position < len(flags):
        name, joined, value = flags[position].partition("=")
        position += 1
        name = hyphenated(name)
        use = table.use(name) if name in table else None
        if (name if use is None else use.name) in UNMODELLED:
            found.unmodelled[name] = None
        elif use is not None and use.option.values:
            # Old builds take --flash-attn and others without a value.
            if not joined and position < len(flags) and flags[position] not in table:
                value = flags[position]
                position += 1
            found.every.setdefault(use.option.canonical, []).append(value.strip())
        elif use is not None:
            found.switches[use.option.canonical] = name not in use.option.negated
    return found


def _files(found: _Scanned) -> Iterable[str]:
    """Files that are loaded whole, beside the model: a projector, adapters, control vectors."""
    yield from filter(None, found.values.get("--mmproj", "").split(","))
    for key in ("--lora", "--control-vector", "--lora-scaled", "--control-vector-scaled"):
        for paths in found.every.get(key, ()):
            for path in filter(None, paths.split(",")):
                yield path.rpartition(":")[0] or path if key.endswith("-scaled") else path


def _rules(found: _Scanned) -> tuple[PlaceRule, ...]:
    """Which tensors stay in RAM; a rule that cannot be followed is noted."""
    rules: list[PlaceRule] = []
    for text in found.every.get("--override-tensor", ()):
        for part in filter(None, text.split(",")):
            pattern, _, place = part.rpartition("=")
            if not readable(pattern) or len(rules) >= MAX_RULES:
                found.unmodelled["--override-tensor"] = None
            else:
                rules.append(PlaceRule(pattern, _IN_RAM.fullmatch(place.strip()) is not None))
    if found.switches.get("--cpu-moe"):
        rules.append(PlaceRule(EXPERTS))
    rules += first_layers(_number(found.values, "--n-cpu-moe", 0))
    if any(not rule.in_ram for rule in rules):
        found.unmodelled["--override-tensor"] = None
    return tuple(rules)


def _snapshots(values: Mapping[str, str]) -> int:
    if _SNAPSHOT_TYPES.isdisjoint(values.get("--spec-type", "").split(",")):
        return 0
    return max(0, min(1_024, _number(values, "--spec-draft-n-max", _DRAFT_TOKENS)))


def _shares(text: str) -> tuple[float, ...]:
    """How the command line divides the model among its GPUs; () where it does not, or leaves one out."""
    parts = text.replace("/", ",").split(",")[:64]
    if not all(re.fullmatch(r"\d{1,9}(?:\.\d{1,9})?", part.strip()) for part in parts):
        return ()
    shares = tuple(float(part) for part in parts)
    return shares if all(share > 0 for share in shares) else ()


def _only_device(values: Mapping[str, str]) -> int | None:
    """The one of the GPUs it is shown that it uses alone, by its place; None when it uses all."""
    named = re.fullmatch(r"[A-Za-z]+(\d{1,3})", values.get("--device", ""))
    if named is not None:
        return int(named[1])
    return max(0, min(999, _number(values, "--main-gpu", 0))) if values.get("--split-mode") == "none" else None


def _number(values: Mapping[str, str], key: str, default: int) -> int:
    text = values.get(key, "")
    found = int(text) if re.fullmatch(r"-?[0-9]{1,15}", text) else default
    return max(-MAX_COUNT, min(MAX_COUNT, found))


def _layers(text: str | None) -> int | None:
    """How many layers are on the GPU; None is all of them, which `auto` and -1 aim at."""
    return int(text) if text is not None and re.fullmatch(r"[0-9]{1,15}", text) else None
