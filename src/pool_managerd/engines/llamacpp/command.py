"""Flags and environment of one llama-server process, from one pool (SPEC §6.6, §20 no. 36–37).

``pools[].ctx`` is llama-server's own ``--ctx-size``: the total over all slots, so one request may use ctx / slots.
GPU-only profiles put every layer on the GPU; profile dev leaves that to the flags and, without a GPU, uses none.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pool_managerd.config import PoolConfig, Profile, path_from
from pool_managerd.core.artifacts import Warmup
from pool_managerd.core.memory.model_shape import Task
from pool_managerd.engines.environment import pool_env
from pool_managerd.engines.flags import FlagUse, OptionTable, arrange, attempt, collapse
from pool_managerd.engines.llamacpp import rules
from pool_managerd.errors import PoolError, SpecError

_SERVES: dict[str, Task] = {"--reranking": "rerank", "--embedding": "embed"}
_PRESET = re.compile(rules.REFUSED_PATTERN[0])
SLOT_SAVE_PATH = "--slot-save-path"


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What the adapter must know beside the pool. ``base_dir`` is the configuration's directory; ``task`` is what the model
    is made for, an ``encoder`` can do nothing else. ``slot_dir`` is where it saves the caches of its slots, if it does.
    """

    profile: Profile
    base_dir: Path
    gpu_present: bool
    tensor_split: tuple[float, ...] | None = None
    encoder: bool = False
    task: Task = "generate"
    slot_dir: str | None = None

    @property
    def gpu_only(self) -> bool:
        return self.profile != "dev"


def build_flags(
    pool: PoolConfig, own: Mapping[str, FlagUse], model_path: str, port: int, table: OptionTable, around: Surroundings
) -> tuple[str, ...]:
    """argv items after the binary: the pool's ``own`` flags and those the daemon sets, in normal form. Deterministic."""
    chosen = dict(own)
    for use in _set_by_daemon(pool, model_path, port, table, around.tensor_split):
        chosen[use.option.canonical] = use
    if around.slot_dir is not None:
        use = table.use(SLOT_SAVE_PATH, around.slot_dir)
        chosen[use.option.canonical] = use
    _place_layers(chosen, table, around)
    _add_default(chosen, table, "--cors-origins", "localhost")
    _add_default(chosen, table, "--alias", pool.served_name or pool.id)  # else answers name the path of the file
    if around.encoder:
        _serve_encoder(chosen, table, around.task)
    return arrange(chosen.values())


def checked_flags(
    pool: PoolConfig, model_path: str, table: OptionTable, around: Surroundings
) -> tuple[dict[str, FlagUse], tuple[PoolError, ...]]:
    """The pool's own flags by option, with the paths of their files, and all that is wrong with them: flags that are unknown,
    malformed or not allowed. Blocks for a look at the files that they name.
    """
    uses, wrong = table.sift(pool.provisioning.flags)
    chosen = collapse(uses)
    problems: list[PoolError] = list(wrong)
    sees_one = pool.tensor_split is None and len(pool.devices) <= 1
    for use in chosen.values():
        problems += refusals(use, table, sees_one=sees_one, gpu_only=around.gpu_only)
    roots = (Path(model_path).parent, around.base_dir)
    for name in rules.FILES:
        if name in table and (found := chosen.get(_canonical(name, table))):
            paths: list[str] = []
            for value in found.values:
                try:
                    paths.append(_confined(found, value, roots, around.base_dir))
                except SpecError as error:
                    problems.append(error)
            chosen[found.option.canonical] = table.use(found.name, *paths)
    return chosen, tuple(problems)


def refusals(use: FlagUse, table: OptionTable, *, sees_one: bool, gpu_only: bool) -> tuple[PoolError, ...]:
    """Why a pool, which ``sees_one`` GPU at most, may not have a flag; nothing where it may."""
    refused = attempt(partial(_check_allowed, use, table)) or attempt(partial(_check_devices, use, table, sees_one))
    return refused or (attempt(partial(_check_on_gpu, use, table)) if gpu_only else ())


def build_env(pool: PoolConfig, profile: Profile) -> dict[str, str]:
    """The engine's environment additions. Raises SpecError for a variable that would bypass the rules."""
    env = dict(pool_env(pool, {}))
    for name in env:
        if name.startswith(rules.ENV_FLAG_PREFIXES):
            raise SpecError(
                f"cannot set {name} in provisioning.env: llama.cpp takes flags from it", hint="use provisioning.flags"
            )
        if profile != "dev" and name in rules.ENV_REFUSED_ON_GPU:
            raise _gpu_only(f"the variable {name}", rules.ENV_REFUSED_ON_GPU[name])
    return env


def _set_by_daemon(
    pool: PoolConfig, model_path: str, port: int, table: OptionTable, split: tuple[float, ...] | None
) -> list[FlagUse]:
    """What the daemon decides. The first four every llama-server has; the rest where the binary knows it."""
    uses = [
        table.use("--model", model_path),
        table.use("--host", "127.0.0.1"),
        table.use("--port", str(port)),
        table.use("--parallel", str(pool.slots)),
    ]
    if pool.ctx is not None:
        uses.append(table.use("--ctx-size", str(pool.ctx)))
    if split is not None:
        uses.append(table.use("--tensor-split", ",".join(f"{share:g}" for share in split)))
    return uses + [table.use(name) for name in ("--metrics", "--no-webui", "--offline") if name in table]


def _place_layers(chosen: dict[str, FlagUse], table: OptionTable, around: Surroundings) -> None:
    if around.gpu_only:
        for name in rules.LAYERS:
            # The draft model's layers only where the pool speaks of a draft model at all.
            if name in table and (name == "--n-gpu-layers" or _canonical(name, table) in chosen):
                use = table.use(name, str(rules.ALL_LAYERS))
                chosen[use.option.canonical] = use
    elif not around.gpu_present:
        _add_default(chosen, table, "--n-gpu-layers", "0")


def _serve_encoder(chosen: dict[str, FlagUse], table: OptionTable, task: Task) -> None:
    """Without one of these flags the engine answers an encoder's every request with an error."""
    if _served_task(chosen, table) is not None:
        return
    if task == "rerank" and "--reranking" in table:
        _add_default(chosen, table, "--reranking")
        return
    if task == "rerank":
        _add_default(chosen, table, "--pooling", "rank")
    _add_default(chosen, table, "--embedding")


def _served_task(uses: Mapping[str, FlagUse], table: OptionTable) -> Task | None:
    """What the flags restrict the engine to."""
    for name, task in _SERVES.items():
        if any(table.names(use, name) for use in uses.values()):
            return task
    return None


def warmup_of(flags: Sequence[str], table: OptionTable, around: Surroundings) -> Warmup:
    """What an engine with these flags can be asked for first: never what it would answer with an error."""
    chosen = collapse(table.parse(flags))
    pooling = next((use.values[0] for use in chosen.values() if table.names(use, "--pooling")), "")
    served = _served_task(chosen, table)
    if served == "rerank" or (served == "embed" and (pooling == "rank" or (around.task == "rerank" and not pooling))):
        return "rerank"
    if served == "embed":
        pooled = pooling != "none" if pooling else around.task == "embed"
        return "embedding" if pooled else "none"
    return "none" if around.encoder else "completion"


def _add_default(chosen: dict[str, FlagUse], table: OptionTable, name: str, *values: str) -> None:
    if name in table:
        use = table.use(name, *values)
        chosen.setdefault(use.option.canonical, use)


def _canonical(name: str, table: OptionTable) -> str:
    return table.use(name).option.canonical


def _check_allowed(use: FlagUse, table: OptionTable) -> None:
    table.refuse(use, rules.OWNED, rules.REFUSED)
    if _PRESET.fullmatch(use.name) and use.name != "--spec-default":
        raise SpecError(f"cannot allow the flag {use.name}: {rules.REFUSED_PATTERN[1]}", hint="remove it from provisioning.flags")


def _check_devices(use: FlagUse, table: OptionTable, sees_one: bool) -> None:
    """What is reserved on each GPU must be what the engine takes there."""
    value = use.values[0].strip().lower() if use.values else ""
    for name, (always, with_one) in rules.GPU_CHOICE.items():
        harmless = f"{always}|{with_one}" if sees_one else always
        if table.names(use, name) and re.fullmatch(harmless, value) is None:
            raise _not_counted(use)
    if any(table.names(use, name) for name in rules.TENSOR_PLACES):
        places = [rule.rpartition("=")[2].strip().lower() for text in use.values for rule in text.split(",")]
        if any(re.fullmatch(rules.PLACES_WITH_ONE if sees_one else rules.PLACES, place) is None for place in places):
            raise _not_counted(use)


def _not_counted(use: FlagUse) -> SpecError:
    return SpecError(
        f"cannot use {' '.join(use.argv)[:80]}: the daemon chooses the GPUs and reserves what each of them holds",
        hint="use pools[].devices, which the engine is then shown alone, and pools[].tensor_split",
    )


def _check_on_gpu(use: FlagUse, table: OptionTable) -> None:
    for name, reason in rules.ON_CPU.items():
        if table.names(use, name):
            raise _gpu_only(f"the flag {use.name}", reason)
    value = ",".join(use.values).strip().lower()
    if any(table.names(use, name) for name in rules.DEVICES) and value in ("none", "cpu"):
        raise _gpu_only(f"{use.name} {value}", "it leaves the GPUs out")
    if any(table.names(use, name) for name in rules.TENSOR_PLACES) and re.search(r"=\s*cpu", value):
        raise _gpu_only(f"{use.name} {use.values[0]}", "it keeps tensors in RAM")
    if any(table.names(use, name) for name in rules.LAYERS) and not _all_layers(value):
        raise _gpu_only(
            f"{use.name} {use.values[0]}", "it may leave layers on the CPU; leave it out, all layers are placed on the GPU"
        )


def _all_layers(value: str) -> bool:
    return value == "all" or (value.isascii() and value.isdigit() and int(value) >= rules.CLEARLY_ALL)


def _gpu_only(what: str, reason: str) -> SpecError:
    return SpecError(
        f"cannot use {what}: {reason} (GPU-only enforcement)",
        hint="remove it, or set `profile: dev` to run engines on the CPU",
        code="GPU_REQUIRED",
    )


def _confined(use: FlagUse, text: str, roots: Sequence[Path], base_dir: Path) -> str:
    """The file (or files, between commas) of ``use`` as real absolute paths, when all lie under one of ``roots``."""
    paths: list[str] = []
    for part in text.split(","):
        real = os.path.realpath(path_from(base_dir, part))
        if not any(Path(real).is_relative_to(os.path.realpath(root)) for root in roots):
            raise SpecError(
                f"cannot use {use.name} {part}: {real} lies outside the model's and the configuration's directory",
                hint="put the file beside the model",
            )
        if not Path(real).is_file():
            raise SpecError(f"cannot use {use.name} {part}: there is no file {real}", hint="check the path")
        paths.append(real)
    return ",".join(paths)
