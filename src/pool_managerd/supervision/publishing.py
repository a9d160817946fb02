"""What the registry and the log are told of an instance, in one step each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from pool_managerd.config import PoolConfig
from pool_managerd.core.gpu.ledger import DeviceAccount, InstanceUsage, physical_gpu
from pool_managerd.core.health import HealthStatus
from pool_managerd.core.lifecycle import Instance, Phase, view
from pool_managerd.core.redaction import masked_text
from pool_managerd.core.registry import DeviceShare, PerfHints

if TYPE_CHECKING:
    from pool_managerd.supervision.workers import Launch


def registry_fields(
    i: Instance, launch: Launch, config: PoolConfig | None, wall_ms: int, node_id: str, model_id_of: Callable[[str], str]
) -> dict[str, Any]:
    """All fields of the registry entry that follow from the configuration, the instance and its present launch.

    What the configuration knows is known before the first start: a mask is no result of one (B-REG-040s).
    """
    seen, prepared = view(i), launch.prepared
    shape = launch.sizing.inputs.shape if launch.sizing is not None else None
    fields: dict[str, Any] = {
        "health": HealthStatus(seen.live, seen.ready), "state": seen.state, "draining": seen.draining,
        "last_error": i.last_error, "crash_count": i.crash_count, "restart_count": i.restart_count,
        "circuit_state": "open" if i.phase is Phase.OPEN else "closed", "last_heartbeat_ms": wall_ms,
        "node_id": node_id, "replica_id": i.replica_id,
    }  # fmt: skip
    quant = shape.quantization if shape is not None else None
    if config is not None:
        quant = config.quant or quant
        fields |= {
            "engine": config.engine, "model_ref": masked_text(config.model),
            "model_id": model_id_of(config.model), "ctx_max": config.ctx,
            "device_mask": None if config.mask is None else str(config.mask),
            "sampler_profile_version": config.sampler_profile_version,
        }  # fmt: skip
    if config is not None or quant is not None:
        fields["quant"] = quant
    if prepared is not None:
        fields |= {
            "engine": prepared.engine, "engine_version": prepared.engine_version, "model_id": prepared.model_id,
            "device_mask": prepared.device_mask, "slots_total": prepared.slots_total,
            "ctx_max": prepared.ctx or (shape.ctx_train if shape is not None else None),
        }  # fmt: skip
    if launch.first_token_ms is not None or quant is not None:
        fields["perf_hints"] = PerfHints(launch.tokens_per_s, launch.first_token_ms, (quant,) if quant is not None else ())
    return fields


class GpuFigures:
    """The registry's fields of the pools' GPUs, all of one look; pools that see the same and hold nothing share theirs."""

    def __init__(self, accounts: Mapping[str, DeviceAccount]) -> None:
        self._accounts, self._kept = accounts, exclusive_gpus(accounts.values())
        self._held: dict[str, dict[str, InstanceUsage]] = {}
        for uuid, account in accounts.items():
            for holding in account.usages:
                self._held.setdefault(holding.instance_id.pool_id, {})[uuid] = holding
        self._made: dict[tuple[str, ...], dict[str, Any]] = {}

    def of(self, pool_id: str, uuids: tuple[str, ...]) -> dict[str, Any]:
        """For the pool that sees ``uuids``; None throughout where it sees none."""
        found = self._made.get(uuids)
        if found is None:
            found = self._made[uuids] = _summed(tuple(_share(self._accounts[uuid], self._kept) for uuid in uuids))
        held = self._held.get(pool_id)
        return found if held is None else self._with(found, held)

    def _with(self, others: dict[str, Any], held: Mapping[str, InstanceUsage]) -> dict[str, Any]:
        """What others see, and the pool's own part."""
        shares = list(others["devices"])
        available, reserved, used = others["vram_available_bytes"], 0, others["vram_used_bytes"]
        for index, share in enumerate(shares):
            holding = held.get(share.uuid)
            if holding is None:
                continue
            account = self._accounts[share.uuid]
            own = account.available_bytes if holding.exclusive and account.device.usable else share.vram_available_bytes
            held_bytes = holding.measured_bytes if account.device.usable else None
            shares[index] = DeviceShare(
                share.id, share.device, share.uuid, share.compute_capability, share.vram_total_bytes, share.vram_free_bytes,
                own, holding.reserved_bytes, held_bytes,
            )  # fmt: skip
            available += own - share.vram_available_bytes
            reserved += holding.reserved_bytes
            used = None if used is None or held_bytes is None else used + held_bytes
        sums = {"vram_available_bytes": available, "vram_reserved_bytes": reserved if shares else None, "vram_used_bytes": used}
        return {**others, "devices": tuple(shares), **sums}


def exclusive_gpus(accounts: Iterable[DeviceAccount]) -> dict[str, str]:
    """The pieces of hardware where nobody else is promised anything, by UUID, and the exclusive pool that is there."""
    return {physical_gpu(a.device): h.instance_id.pool_id for a in accounts for h in a.usages if h.exclusive}


def _share(account: DeviceAccount, kept: Mapping[str, str]) -> DeviceShare:
    """A device as a pool meets it that holds nothing there."""
    d = account.device
    free = d.vram_free_bytes if d.readable else None
    available = account.available_bytes if d.usable and physical_gpu(d) not in kept else 0
    return DeviceShare(
        d.id, d.label, d.uuid, d.compute_capability, d.vram_total_bytes, free, available, 0, 0 if d.usable else None
    )


def _summed(shares: tuple[DeviceShare, ...]) -> dict[str, Any]:
    """Of somebody who holds nothing there."""
    capabilities = [s.compute_capability for s in shares if s.compute_capability]
    free = [s.vram_free_bytes for s in shares if s.vram_free_bytes is not None]
    return {
        "devices": shares,
        "vram_total_bytes": sum(s.vram_total_bytes for s in shares) if shares else None,
        "vram_free_bytes": sum(free) if free else None,
        "vram_available_bytes": sum(s.vram_available_bytes for s in shares) if shares else None,
        "vram_reserved_bytes": 0 if shares else None,
        "vram_used_bytes": 0 if shares and all(s.vram_used_bytes is not None for s in shares) else None,
        "compute_capability": min(capabilities, key=_as_numbers, default=None),
    }


def _as_numbers(capability: str) -> tuple[int, ...]:
    return tuple(int(part) for part in capability.split(".") if part.isdigit())


def log_context(i: Instance, launch: Launch, config: PoolConfig | None) -> dict[str, Any]:
    """The fields that every line about a pool carries (SPEC §14)."""
    context: dict[str, Any] = {"engine": config.engine if config else None, "restart_count": i.restart_count}
    if (prepared := launch.prepared) is not None:
        context |= {
            "engine": prepared.engine, "engine_version": prepared.engine_version, "model_id": prepared.model_id,
            "device_mask": prepared.device_mask, "replica_id": prepared.replica_id,
        }  # fmt: skip
    return context
