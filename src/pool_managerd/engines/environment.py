"""The variables that an engine process gets beside its own: those of the pool, checked, and the GPUs it may see."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial

from pool_managerd.config import PoolConfig
from pool_managerd.core.gpu.allocation import Allocation
from pool_managerd.core.gpu.masks import cuda_environment
from pool_managerd.engines.flags import attempt
from pool_managerd.errors import PoolError, SpecError

_OWNED = {"CUDA_VISIBLE_DEVICES": "pools[].devices", "CUDA_DEVICE_ORDER": "nothing: it is always PCI_BUS_ID"}


def pool_env(pool: PoolConfig, owned: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """The pool's own variables. ``owned``: what else the daemon sets, with the key to use instead. Raises SpecError."""
    for name, value in pool.provisioning.env.items():
        if not name or "=" in name or "\0" in name + value:
            raise SpecError(
                f"cannot set the variable {name!r} for the engine: it is no variable name, or holds NUL", pool_id=pool.id
            )
        instead = _OWNED.get(name) or owned.get(name)
        if instead is not None:
            raise SpecError(f"cannot set {name} in provisioning.env: the daemon sets it", hint=f"use {instead}")
        yield name, value


def env_problems(pool: PoolConfig, build: Callable[[PoolConfig], object]) -> tuple[PoolError, ...]:
    """What ``build``, which makes a pool's environment, refuses of each of its variables."""
    found: tuple[PoolError, ...] = ()
    for name, value in pool.provisioning.env.items():
        alone = pool.model_copy(update={"provisioning": pool.provisioning.model_copy(update={"env": {name: value}})})
        found += attempt(partial(build, alone))
    return found


def device_env(pool: PoolConfig, allocation: Allocation | None) -> dict[str, str]:
    """CUDA variables that show the engine what it was assigned; without GPUs, what the mask says as it stands."""
    if allocation is not None:
        return allocation.environment()
    return {} if pool.mask is None else cuda_environment(pool.mask.to_cuda_visible_devices())
