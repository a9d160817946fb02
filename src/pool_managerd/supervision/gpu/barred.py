"""What keeps a pool from starting whatever memory there is: rules on what is loaded together, GPUs that are left to others."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

from pool_managerd.core.demand.together import Together
from pool_managerd.core.gpu.devices import DeviceSnapshot
from pool_managerd.core.gpu.kept_free import KeptFree
from pool_managerd.core.instance_id import InstanceId
from pool_managerd.core.lifecycle import Phase
from pool_managerd.core.lifecycle.phase import IDLE
from pool_managerd.errors import NodeError
from pool_managerd.supervision.pool import Pool


def require_together(pool: Pool, pools: Iterable[Pool], rules: Together, gone: Collection[InstanceId]) -> None:
    """Raises NodeError NOT_TOGETHER where one of ``pools`` that is not ``gone`` is kept apart from ``pool``."""
    loaded = {one.pool_id for one in pools if one.instance_id not in gone and _is_loaded(one)}
    in_the_way = min(rules.ways(pool.pool_id, loaded), key=len)
    if in_the_way:
        other = min(in_the_way)
        raise NodeError(
            f"cannot start pool {pool.pool_id} while pool {other} is loaded: {rules.why_apart(pool.pool_id, other)}",
            code="NOT_TOGETHER", status=503, pool_id=pool.pool_id,
            hint=f"`pool-managerd evict {' '.join(sorted(in_the_way))}`, or change `together` in the configuration",
        )  # fmt: skip


def require_some_left(pool_id: str, wanted: Sequence[DeviceSnapshot], left: Mapping[str, KeptFree], *, masked: bool) -> None:
    """Raises NodeError GPU_YIELDED where GPUs that it needs are ``left`` to others: any of a mask, or all that there are."""
    others = [device for device in wanted if device.uuid in left]
    if others and (masked or len(others) == len(wanted)):
        one = left[others[0].uuid]
        raise NodeError(
            f"cannot start pool {pool_id}: GPU {others[0].label} is left to others ({one.why})", code="GPU_YIELDED", status=503,
            pool_id=pool_id, hint=one.remedy,
        )  # fmt: skip


def _is_loaded(pool: Pool) -> bool:
    """It has an engine, or has been admitted to have one; somebody else's is loaded when they say so."""
    waits = pool.instance.phase is Phase.STAGING and pool.launch.sizing is None
    return not (waits or pool.definition.external or pool.instance.phase in IDLE or pool.instance.phase is Phase.BACKOFF)
