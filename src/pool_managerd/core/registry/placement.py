"""Which pool takes a request: pure and deterministic, with a reason for every candidate (ORCH-3010..3012, ORCH-3900)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pool_managerd.core.gpu.masks import DeviceMask
from pool_managerd.core.narration import count, size
from pool_managerd.core.registry.snapshot import PoolSnapshot


@dataclass(frozen=True, slots=True)
class PlacementRequest:
    """What the work needs. ``ctx_tokens`` is what one request may fill; ``vram_bytes`` what must be free beside what is loaded.

    ``pin`` names the only pool, ``prefer`` those that come first, ``avoid`` those that come last. Without
    ``allow_fallback`` nothing but the preferred, and nothing avoided, is taken. ``device_mask``: the only GPUs it may touch.
    """

    model: str | None = None
    engine: str | None = None
    quantization: str | None = None
    ctx_tokens: int = 0
    vram_bytes: int = 0
    device_mask: DeviceMask | None = None
    pin: str | None = None
    prefer: tuple[str, ...] = ()
    avoid: tuple[str, ...] = ()
    allow_fallback: bool = True


@dataclass(frozen=True, slots=True)
class Candidate:
    """One pool and why it is not taken; ``objection`` None: it is feasible."""

    pool_id: str
    objection: str | None = None


@dataclass(frozen=True, slots=True)
class Decision:
    """The pool, or None, with one sentence why; every candidate in the order of preference, infeasible ones last."""

    pool_id: str | None
    why: str
    candidates: tuple[Candidate, ...]
    code: str = "assigned"
    fallback: bool = False


def decide(request: PlacementRequest, pools: Iterable[PoolSnapshot]) -> Decision:
    """Feasible pools first, then most VRAM free for them, fewest active leases, pool id. Equal input gives an equal answer."""
    by_id = sorted(pools, key=lambda pool: pool.pool_id)
    allowed = _allowed(request)
    objections = {pool.pool_id: _objection(request, pool, allowed) for pool in by_id}
    feasible = sorted((pool for pool in by_id if objections[pool.pool_id] is None), key=_rank)
    listed = tuple(Candidate(p.pool_id) for p in feasible) + tuple(
        Candidate(p.pool_id, objections[p.pool_id]) for p in by_id if objections[p.pool_id] is not None
    )
    if request.pin is not None:
        return _pinned(request.pin, feasible, listed)
    chosen, fallback = _preferred(request, feasible)
    if chosen is None:
        code = "no_preferred_feasible" if feasible else "no_capacity"
        why = _ruled_out(request, listed) if feasible else _nobody(listed)
        return Decision(None, why, listed, code)
    why = f"Pool '{chosen.pool_id}' takes it{' as a fallback' if fallback else ''}: {_advantage(chosen, feasible)}"
    return Decision(chosen.pool_id, why, listed, fallback=fallback)


def objection(request: PlacementRequest, pool: PoolSnapshot) -> str | None:
    """Why ``pool`` cannot take the request, None when it can (OC-CORE-1011, 1012)."""
    return _objection(request, pool, _allowed(request))


def _objection(request: PlacementRequest, pool: PoolSnapshot, allowed: frozenset[str] | None) -> str | None:
    if pool.draining:
        return "it is draining"
    if not pool.ready:
        return f"it is not ready ({pool.state}{f': {pool.last_error}' if pool.last_error else ''})"
    if request.model is not None and request.model not in (pool.model_id, pool.model_ref):
        return f"it serves {pool.model_id or 'another model'}"
    if request.engine is not None and request.engine != pool.engine:
        return f"its engine is {pool.engine}"
    if request.quantization is not None and not _quantized(request.quantization, pool):
        return f"its quantisation is {pool.quant or 'not known'}"
    per_slot = None if pool.ctx_max is None else pool.ctx_max // max(1, pool.slots_total or 1)
    if per_slot is not None and request.ctx_tokens > per_slot:
        return f"one request may fill {per_slot} tokens of its context, not {request.ctx_tokens}"
    if request.vram_bytes and request.vram_bytes > (pool.vram_room_bytes or 0):
        return f"{size(pool.vram_room_bytes or 0)} of VRAM are free for it, {size(request.vram_bytes)} are needed"
    if allowed is not None and (outside := _outside(allowed, pool)):
        gpus = f"GPU{'s' if len(outside) > 1 else ''} {', '.join(outside)}"
        return f"it runs on {gpus}, outside the mask {request.device_mask}"
    if pool.slots_free == 0:
        return f"all {pool.slots_total} slots are in use"
    return None


def _rank(pool: PoolSnapshot) -> tuple[int, int, str]:
    return (-(pool.vram_room_bytes or 0), pool.active_leases, pool.pool_id)


def _quantized(wanted: str, pool: PoolSnapshot) -> bool:
    if pool.quant is not None and pool.quant.lower() == wanted.lower():
        return True
    return pool.perf_hints is not None and any(text.lower() == wanted.lower() for text in pool.perf_hints.quantizations)


def _allowed(request: PlacementRequest) -> frozenset[str] | None:
    """The names of the GPUs that it may touch; None: all."""
    return None if request.device_mask is None else frozenset(str(item).lower() for item in request.device_mask.items)


def _outside(allowed: frozenset[str], pool: PoolSnapshot) -> list[str]:
    """The pool's GPUs that may not be touched; a pool that uses none cannot be told to stay on some."""
    return [d.device for d in pool.devices if d.device.lower() not in allowed and d.uuid.lower() not in allowed]


def _pinned(pin: str, feasible: Sequence[PoolSnapshot], listed: tuple[Candidate, ...]) -> Decision:
    if any(pool.pool_id == pin for pool in feasible):
        return Decision(pin, f"Pool '{pin}' takes it: the request names it", listed)
    known = next((c.objection for c in listed if c.pool_id == pin), "there is no such pool")
    return Decision(None, f"Pool '{pin}', which the request names, cannot take it: {known}", listed, "pinned_pool_infeasible")


def _preferred(request: PlacementRequest, feasible: Sequence[PoolSnapshot]) -> tuple[PoolSnapshot | None, bool]:
    """The best pool by what is preferred, and whether it is a fallback."""
    welcome = [p for p in feasible if p.pool_id not in request.avoid]
    wanted = [p for p in welcome if p.pool_id in request.prefer] if request.prefer else welcome
    if wanted:
        return wanted[0], False
    rest = (welcome or list(feasible)) if request.allow_fallback else []
    return (rest[0], True) if rest else (None, False)


def _advantage(chosen: PoolSnapshot, feasible: Sequence[PoolSnapshot]) -> str:
    if len(feasible) == 1:
        return "it is the only one that can"
    leases = count(chosen.active_leases, "active lease")
    if chosen.vram_room_bytes is None:
        return f"it has {leases}"
    return f"{size(chosen.vram_room_bytes)} of VRAM are free for it, and it has {leases}"


def _ruled_out(request: PlacementRequest, listed: tuple[Candidate, ...]) -> str:
    """Without fallback: what keeps those from it that the request would have."""
    known = {c.pool_id: c.objection or "is to be avoided, too" for c in listed}
    wanted = "; ".join(f"{name}: {known.get(name, 'there is no such pool')}" for name in request.prefer[:5])
    why = f"no preferred pool can take it ({wanted})" if wanted else "all that could take it are to be avoided"
    return f"No pool takes it: {why}, and the request allows no fallback"


def _nobody(listed: tuple[Candidate, ...]) -> str:
    if not listed:
        return "There is no pool"
    return "No pool can take it: " + "; ".join(f"{c.pool_id}: {c.objection}" for c in listed[:5])
