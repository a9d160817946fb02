"""What a model will cost, said before it is fetched; and what could not run here is refused then."""

from __future__ import annotations

import asyncio

from pool_managerd.core.memory.model_shape import ModelShape
from pool_managerd.core.narration import count, size
from pool_managerd.errors import NodeError, PoolError, SpecError
from pool_managerd.supervision.pool import Pool
from pool_managerd.supervision.protocols import Foreseen
from pool_managerd.supervision.services import Services

LOOK_S = 15.0
"""So long a question that a person asks may wait for a hub."""


async def require_possible(pool: Pool, s: Services) -> Foreseen | None:
    """What is to be fetched for a start of ``pool``, before a byte of it is; None where nothing is.

    Raises PoolError for what could not run here, whoever else gave way. What may only be in the way now is no reason: the
    download takes its time.
    """
    config = pool.config
    ahead = None if config is None else await s.models.foresee(config.model, config.checksums, fresh=True)
    if ahead is None:
        return None
    if ahead.problem:
        raise SpecError(ahead.problem, pool_id=pool.pool_id, hint="name another file, or have it made anew where it comes from")
    if ahead.shape is not None:
        try:
            await s.admission.forecast(pool)
        except PoolError as problem:
            if not problem.retriable:
                raise
    return ahead


async def foreseen_of(pool: Pool, s: Services) -> tuple[dict[str, str] | None, PoolError | None]:
    """For `explain`: the step that fetches the pool's model, if one does, and what stands in its way. Nothing is asked twice."""
    if pool.config is None:
        return None, None
    try:
        async with asyncio.timeout(LOOK_S):
            ahead = await s.models.foresee(pool.config.model, pool.config.checksums)
    except TimeoutError:
        return _unknown(f"it was not found out within {LOOK_S:g} s"), None
    except NodeError as problem:  # which may be over when it is started
        return _unknown(problem.message), None
    except PoolError as problem:
        return None, problem
    if ahead is None:
        return None, None
    if ahead.problem:
        return None, SpecError(ahead.problem)
    if ahead.shape is None:
        return _unknown("its headers do not tell it", f": {amount(ahead)}"), None
    return {"kind": "fetch", "detail": f"its model is fetched first: {amount(ahead)}; it is {character(ahead.shape)}"}, None


def _unknown(why: str, more: str = "") -> dict[str, str]:
    return {"kind": "fetch", "detail": f"its model is fetched first{more}; what it needs is known then: {why}"}


def amount(ahead: Foreseen) -> str:
    """How much there is to be fetched."""
    what = "an unknown amount" if ahead.size_bytes is None else size(ahead.size_bytes)
    return what if len(ahead.files) == 1 else f"{what} in {count(len(ahead.files), 'file')}"


def character(shape: ModelShape) -> str:
    """What kind of model it is."""
    trained = f"trained for {shape.ctx_train} tokens" if shape.ctx_train else None
    return ", ".join(filter(None, (shape.architecture, shape.quantization, trained)))
