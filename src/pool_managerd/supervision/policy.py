"""By which rules a pool lives, and who may have an engine of their own run: under which name, how large, with which secrets."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from typing import Any

from pool_managerd.config import Config, HealthConfig, PoolConfig, is_pool_id, split_address
from pool_managerd.core.artifacts import AnyEngine, AttachedEngine, PreparedEngine
from pool_managerd.core.backoff import BackoffRules
from pool_managerd.core.breaker import BreakerRules
from pool_managerd.core.engines import startup_ms as startup_ms_of
from pool_managerd.core.lifecycle import Policy
from pool_managerd.core.redaction import Redactor, secrets_in
from pool_managerd.core.restart_limit import RestartRules
from pool_managerd.errors import RequestError, SpecError
from pool_managerd.supervision.pool import Definition, Pool

MAX_SUBMITTED_CHARS = 8 << 20
MAX_OLD_SECRETS = 256

_VARIABLES = frozenset({
    "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "OMP_NUM_THREADS", "OMP_PROC_BIND", "OMP_PLACES", "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS", "TOKENIZERS_PARALLELISM", "NCCL_DEBUG", "NCCL_P2P_DISABLE", "NCCL_IB_DISABLE",
    "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "LLAMA_API_KEY", "VLLM_API_KEY",
    "LANG", "LC_ALL", "TZ",
})  # fmt: skip
_AS_FLAGS = ("LLAMA_ARG_",)  # what a flag could say as well
_CHANGES_THE_PROGRAM = re.compile(
    r"(?:LD|DYLD|PYTHON|PERL|RUBY|NODE|JAVA|JDK|_JAVA|GIO|GTK|QT)_|PYTHON|PERL|RUBY|NODE_|BASH|ENV$|GCONV_PATH|GLIBC_|MALLOC_"
    r"|IFS$|PATH$|HOME$|SHELL|NLSPATH|LOCPATH|OMP_TOOL|CUDA_INJECTION|NCCL_.*PLUGIN|GGML_BACKEND|NVBIT|VK_|OCL_|SSLKEYLOGFILE"
)


def policy_for(config: Config, pool_id: str, pool: PoolConfig | None, node_id: str, submitted: AnyEngine | None = None) -> Policy:
    """The policy of one pool; ``pool`` is None for a ``submitted`` one, which follows the defaults and is not warmed up."""
    health, supervision = config.health, config.supervision
    engine = pool.engine if pool is not None else submitted.engine if submitted is not None else ""
    startup_ms = (pool.startup_timeout_ms if pool else None) or _startup_ms(health, engine)
    return Policy(
        startup_timeout_s=startup_ms / 1000,
        startup_cap_s=health.startup_cap_ms / 1000,
        stall_s=health.stall_ms / 1000,
        busy_limit_s=health.busy_limit_ms / 1000,
        probe_gap_ms=health.interval_ms,
        probe_interval_s=health.probe_interval_ms / 1000,
        probe_timeout_s=health.probe_timeout_ms / 1000,
        failure_threshold=health.failure_threshold,
        drain_deadline_s=config.lifecycle.drain_deadline_ms / 1000,
        stop_grace_ms=supervision.stop_grace_ms,
        vram_wait_s=config.gpu.vram_wait_ms / 1000,
        restart=(pool.restart if pool else None) or supervision.restart,
        warmup=config.lifecycle.warmup,
        save_timeout_s=config.slot_cache.save_timeout_ms / 1000,
        restore_timeout_s=config.slot_cache.restore_timeout_ms / 1000,
        primes=pool is not None and pool.prime_prompt is not None,
        fail_open=config.profile == "dev",
        backoff=BackoffRules(**supervision.backoff.model_dump()),
        breaker=BreakerRules(**supervision.breaker.model_dump()),
        restart_limit=RestartRules(**supervision.restart_limit.model_dump()),
        seed=f"{node_id}:{pool_id}",
    )


def _startup_ms(health: HealthConfig, engine: str) -> int:
    """What was written; where nothing was, what engines of this kind need."""
    written = "startup_timeout_ms" in health.model_fields_set
    return health.startup_timeout_ms if written else startup_ms_of(engine, health.startup_timeout_ms)


def check_submission(config: Config, pool_id: str, engine: PreparedEngine) -> None:
    """Raises SpecError for the pool id, RequestError POLICY_DENIED for an engine that must not run here (DESIGN §7)."""
    check_pool_id(pool_id)
    profile, host = config.profile, split_address(config.daemon.bind)[0]
    loopback = host in ("localhost", "::1") or host.startswith("127.")
    listed = engine.binary_path in config.policy.engine_allowlist
    if not (profile == "dev" or (profile == "home" and loopback) or listed):
        raise RequestError(
            f"cannot run a submitted engine in profile {profile} on {host}",
            code="POLICY_DENIED", status=403, pool_id=pool_id,
            hint="put the binary's path on policy.engine_allowlist",
        )  # fmt: skip
    if profile == "cloud":
        _check_variables(config, pool_id, engine)


def _check_variables(config: Config, pool_id: str, engine: PreparedEngine) -> None:
    """A listed binary must not become another program by its environment."""
    for name in engine.env:
        if _CHANGES_THE_PROGRAM.match(name):
            raise _refused(pool_id, name, "it can make any program run any code", "leave it out")
        if name not in _VARIABLES and name not in config.policy.engine_env and not name.startswith(_AS_FLAGS):
            raise _refused(pool_id, name, "it is not on the list", "leave it out, or put it on policy.engine_env")


def _refused(pool_id: str, name: str, why: str, hint: str) -> RequestError:
    return RequestError(
        f"cannot run a submitted engine with the variable {name[:80]!r} in profile cloud: {why}",
        code="POLICY_DENIED", status=403, pool_id=pool_id, hint=hint,
    )  # fmt: skip


def check_pool_id(pool_id: str) -> None:
    """Raises SpecError when ``pool_id`` cannot name a pool."""
    if not is_pool_id(pool_id):
        raise SpecError(f"cannot use {pool_id[:64]!r} as a pool id", hint="1 to 63 letters, digits, '.', '_' or '-'")


def learn_secrets(redactor: Redactor, pool_id: str, definition: Definition) -> None:
    """From now on nothing that leaves the node shows them."""
    found: set[str] = set()
    if definition.config is not None:
        given = definition.config.provisioning
        found |= secrets_in(given.env, (*given.flags, given.url or ""))
    if isinstance(definition.submitted, PreparedEngine):
        found |= secrets_in(definition.submitted.env, definition.submitted.flags)
    # What it had before stays known: its engine's log may hold it still.
    redactor.know(pool_id, found | set(redactor.known(pool_id, MAX_OLD_SECRETS)))


def learn_secrets_of(redactor: Redactor, pool: Pool, env: Mapping[str, str], argv: Sequence[str]) -> bool:
    """Learn what was not written to disk from the engine that still has it; false where it does not show it any more."""
    withheld = pool.definition.barred.details.get("withheld", []) if pool.definition.barred is not None else []
    found = {env[name] for name in withheld if name in env} | secrets_in({}, argv)
    redactor.know(pool.pool_id, found | set(redactor.known(pool.pool_id, MAX_OLD_SECRETS)))
    return not withheld or bool(env or argv)


def check_startable(config: Config, pool: Pool) -> None:
    """Raises PoolError when there is nothing to run, or nothing that may run: policy is asked at every start."""
    definition = pool.definition
    if definition.barred is not None:
        raise copy(definition.barred)
    if isinstance(definition.submitted, PreparedEngine):
        check_submission(config, pool.pool_id, definition.submitted)
    if definition.submitted is None and definition.config is None:
        raise RequestError(
            f"cannot start pool {pool.pool_id}: it has neither a configuration nor a submitted engine",
            code="POOL_NOT_CONFIGURED", status=409, pool_id=pool.pool_id,
            hint="add it to the configuration, or preload it with an engine",
        )  # fmt: skip


def check_room(pool: Pool, engine: AnyEngine, pools: Iterable[Pool]) -> None:
    """Raises RequestError when all submitted engines together would take more than the node keeps for them."""
    if isinstance(engine, AttachedEngine):
        return
    others = (other.submitted.size_chars for other in pools if isinstance(other.submitted, PreparedEngine) and other is not pool)
    if sum(others) + engine.size_chars > MAX_SUBMITTED_CHARS:
        raise RequestError(
            f"cannot take the engine of pool {pool.pool_id}: the submitted engines have {MAX_SUBMITTED_CHARS >> 20} MiB of"
            " flags and environment already",
            code="TOO_MANY_POOLS", status=409, pool_id=pool.pool_id, hint="delete pools that are not needed any more",
        )  # fmt: skip


def not_kept(pool_id: str, names: Any) -> RequestError:
    """The error of a start whose secrets were never written to disk."""
    shown = ", ".join(str(name)[:80] for name in names[:8]) if isinstance(names, list) else "some"
    return RequestError(
        f"cannot start pool {pool_id} again: its secrets ({shown}) are not written to disk, and went with the daemon before",
        code="SECRETS_NOT_KEPT", status=409, pool_id=pool_id, hint="preload it again with them, or configure the pool",
        details={"withheld": [str(name) for name in names] if isinstance(names, list) else []},
    )  # fmt: skip
