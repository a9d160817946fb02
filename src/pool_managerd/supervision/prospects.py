"""What a model would need on this node, for whoever thinks of fetching it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pool_managerd.config import PoolConfig
from pool_managerd.core.lifecycle import PoolState
from pool_managerd.core.memory.estimate import DeviceFraction, EngineSettings
from pool_managerd.core.memory.estimator import LaunchInputs
from pool_managerd.core.memory.model_shape import ModelShape
from pool_managerd.errors import NodeError, PoolError, SpecError
from pool_managerd.supervision.foresight import amount
from pool_managerd.supervision.launch import Launch
from pool_managerd.supervision.pool import Pool
from pool_managerd.supervision.pools import Pools
from pool_managerd.supervision.protocols import Foreseen
from pool_managerd.supervision.services import Services

USUAL_CTX = 8_192
"""Tokens of context that an estimate is for where no pool says how many."""
CONTEXTS = (32_768, 16_384, 8_192, 4_096, 2_048)
"""What is tried where nobody says: more than the first is rarely used, and less than the last is of little use."""
_ROOM = frozenset({"INSUFFICIENT_VRAM", "INSUFFICIENT_RAM", "GPU_UNAVAILABLE"})
_FRACTION = 0.9
"""Of a GPU, what vLLM takes where no pool says how much."""


@dataclass(frozen=True, slots=True)
class Prospects:
    """What models would need here. ``overhead_bytes`` is what an engine takes of each GPU for itself."""

    pools: Pools
    services: Services
    overhead_bytes: int

    async def plan(self, ref: str, ahead: Foreseen, users: list[PoolConfig]) -> dict[str, Any]:
        """What a pull would fetch and what it is for: of ``users``, the pools that have it, or by itself."""
        shape = ahead.shape
        model_id = self.services.models.id_of(ref)
        fits = [await self._of_pool(config) for config in users] if shape is not None else []
        if shape is not None and not users:
            fits = [await self._by_itself(ref, ahead, shape)]
        return {
            "ref": model_id, "present": False, "files": [file.name for file in ahead.files], "size_bytes": ahead.size_bytes,
            "problem": ahead.problem or None, "architecture": None if shape is None else shape.architecture,
            "quantization": None if shape is None else shape.quantization,
            "ctx_train": None if shape is None else shape.ctx_train, "fits": fits,
        }  # fmt: skip

    async def _of_pool(self, config: PoolConfig) -> dict[str, Any]:
        return await self._fit(config, None) | {"pool_id": config.id}

    async def _by_itself(self, ref: str, ahead: Foreseen, shape: ModelShape) -> dict[str, Any]:
        ctx = min(shape.ctx_train or USUAL_CTX, USUAL_CTX)
        gguf = ahead.files[0].name.lower().endswith(".gguf")
        settings = EngineSettings(ctx=ctx) if gguf else DeviceFraction(_FRACTION, ctx)
        config = PoolConfig(id="prospect", engine="llamacpp" if gguf else "vllm", model=ref, ctx=ctx)
        inputs = LaunchInputs("", ref, settings, shape, ahead.size_bytes or 0, self.overhead_bytes)
        found = await self._fit(config, inputs)
        return found | {"problem": found["problem"] and found["problem"].partition(": ")[2]}

    async def _fit(self, config: PoolConfig, inputs: LaunchInputs | None) -> dict[str, Any]:
        """Where it would run, or why it would not."""
        found: dict[str, Any] = {
            "pool_id": None,
            "ctx": config.ctx,
            "slots": config.slots,
            "where": None,
            "needs": [],
            "problem": None,
        }
        pool = _record(self.pools, config)
        try:
            where, needs = await self.services.admission.forecast(pool, inputs)
        except PoolError as problem:
            return found | {"problem": self.services.events.clean_error(problem).message}
        return found | {"where": where, "needs": list(needs)}


@dataclass(frozen=True, slots=True)
class Proposal:
    """A pool as it would run here: ``where``, and the parts of what it ``needs``. ``fetched`` says what is fetched for it."""

    pool: PoolConfig
    where: str
    needs: tuple[str, ...]
    fetched: str = ""


async def propose(pools: Pools, s: Services, wanted: PoolConfig) -> Proposal:
    """``wanted`` with the longest context that fits, up to what its model was trained for, on one GPU if that does, else on
    several. A ``ctx`` that it has stays. Raises PoolError for what cannot run here at all.
    """
    ahead = await s.models.foresee(wanted.model, wanted.checksums, fresh=True)
    if ahead is not None and ahead.problem:
        raise SpecError(ahead.problem, hint="name another file of it")
    fetched = "" if ahead is None else amount(ahead)
    shape = (await s.sizer(wanted, None)).shape
    refused: list[PoolError] = []
    for ctx in contexts(wanted, shape):
        for split in (wanted.tensor_split, "auto"):
            tried = wanted.model_copy(update={"ctx": ctx, "tensor_split": split})
            try:
                where, needs = await s.admission.forecast(_record(pools, tried))
            except NodeError as problem:
                if problem.code not in _ROOM:
                    raise
                refused.append(problem)
                continue
            return Proposal(tried, where, needs, fetched)
    raise refused[0]


def contexts(wanted: PoolConfig, shape: ModelShape | None) -> tuple[int, ...]:
    """Tokens over all slots, the most first; beyond what a model was trained for there is no use in them."""
    if wanted.ctx is not None:
        return (wanted.ctx,)
    trained = (shape.ctx_train if shape is not None else None) or USUAL_CTX
    each = dict.fromkeys(min(trained, most) for most in CONTEXTS)
    return tuple(one * wanted.slots for one in each)


def _record(pools: Pools, config: PoolConfig) -> Pool:
    """A pool that nobody knows of."""
    return Pool(config.id, pools.definitions.of(config.id, config), PoolState.new(config.id), Launch())
