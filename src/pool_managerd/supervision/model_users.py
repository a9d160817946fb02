"""Who needs which model: pools as configured and as they run, what a reload tries and goes back to, what an apply brings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from pool_managerd.config import Config, PoolConfig, path_from
from pool_managerd.core.artifacts import AnyEngine, PreparedEngine
from pool_managerd.core.lifecycle import Phase
from pool_managerd.supervision.pool import Pool, Role
from pool_managerd.supervision.pools import Pools
from pool_managerd.supervision.precedence import Wanted
from pool_managerd.supervision.services import Services


@dataclass(frozen=True, slots=True)
class Need:
    """``pool_id`` needs ``ref`` (None: what it runs has no name here), and files that ``words`` name or that lie in ``folder``;
    ``why`` is a sentence.
    """

    pool_id: str
    why: str
    ref: str | None = None
    words: tuple[str, ...] = ()
    folder: str = ""

    def covers(self, ref: str, paths: Sequence[str]) -> bool:
        if ref == self.ref:
            return True
        inside = f"{self.folder.rstrip('/')}/"
        return any((len(inside) > 1 and path.startswith(inside)) or any(path in word for word in self.words) for path in paths)


class ModelUsers:
    """``config`` is what is in force."""

    def __init__(self, pools: Pools, services: Services, config: Callable[[], Config]) -> None:
        self._pools, self._s, self._config = pools, services, config

    def all(self) -> list[Need]:
        """As it is at this moment: the loop that changes it does not go on in between."""
        found = [self._of_config(pool, "is configured with it") for pool in self._config().pools]
        for pool in self._pools.instances():
            found += self._of_pool(pool)
        for wanted in self._pools.needs():
            found += self._of(wanted)
        return found

    def _of_pool(self, pool: Pool) -> Iterator[Need]:
        yield from self._of(Wanted(pool.pool_id, _ROLES[pool.role], pool.config, pool.submitted))
        if pool.launch.prepared is not None and pool.instance.phase not in (Phase.DOWN, Phase.FAILED):
            yield _of_engine(pool.pool_id, pool.launch.prepared, "runs it")

    def _of(self, wanted: Wanted) -> Iterator[Need]:
        if wanted.config is not None:
            yield self._of_config(wanted.config, wanted.why)
        if wanted.engine is not None:
            yield _of_engine(wanted.pool_id, wanted.engine, wanted.why)

    def _of_config(self, pool: PoolConfig, why: str) -> Need:
        model_id, place = self._s.models.id_of(pool.model), ""
        if model_id.startswith("file:"):
            place = str(path_from(self._config().base_dir, model_id.removeprefix("file:")))
        words = (place, *(str(flag) for flag in pool.provisioning.flags))
        return Need(pool.id, f"pool {pool.id} {why}", model_id, words, place)


def _of_engine(pool_id: str, engine: AnyEngine, why: str) -> Need:
    path = engine.model_path or ""
    words = (path, *engine.model_files, *engine.argv, *engine.env.values()) if isinstance(engine, PreparedEngine) else (path,)
    return Need(pool_id, f"pool {pool_id} {why}", engine.model_id, words, path)


_ROLES = {
    Role.CURRENT: "is configured with it", Role.CANDIDATE: "is being reloaded to it",
    Role.RETIRING: "has requests that still run on it",
}  # fmt: skip
