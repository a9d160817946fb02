"""What callers of the node ask of the cache of models: a part of the façade."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pool_managerd.config import PoolConfig
from pool_managerd.supervision.model_cache import ModelCacheWork
from pool_managerd.supervision.operations import Operation
from pool_managerd.supervision.prospects import Proposal

__all__ = ["ModelCalls", "Proposal"]


class ModelCalls:
    """Mixed into ``PoolManager``, whose parts these are."""

    _models: ModelCacheWork

    async def models(self, *, everywhere: bool = False) -> list[dict[str, Any]]:
        """The models that were fetched, with ``ref``, ``path``, ``size_bytes``, ``digest``, ``verified`` and their ``pools``;
        ``everywhere``: and those that other tools have on this machine, with ``tool``.
        """
        return await self._models.rows(everywhere=everywhere)

    async def plan_pull(self, ref: str) -> dict[str, Any]:
        """What a pull of ``ref`` would fetch, and how much that is; nothing is fetched. Raises PoolError."""
        return await self._models.plan(ref)

    async def propose(self, wanted: PoolConfig) -> Proposal:
        """``wanted`` with the context that fits and, where it must be, a division over GPUs, by its model's headers: ``pool``,
        ``where`` and ``needs``. Nothing else of the model is fetched, and nothing started. Raises PoolError.
        """
        return await self._models.propose(wanted)

    async def pull_model(self, ref: str) -> Operation:
        """Fetch a model into the cache, for no pool; who asks meanwhile joins. Raises SpecError, NodeError, RequestError."""
        return await self._models.pull(ref)

    async def import_model(self, path: str, name: str | None = None, digests: Sequence[str] = ()) -> Operation:
        """Bring a GGUF file of this machine into the cache, as ``local:NAME`` or another reference; ``path`` is absolute, and
        read by the daemon's user. ``digests`` (``sha256:<hex>`` for each file) are checked. Raises PoolError.
        """
        return await self._models.bring(path, name, digests)

    async def verify_model(self, ref: str) -> Operation:
        """Hash a model in the cache anew: its outcome has ``ok`` and ``wrong``. Raises RequestError MODEL_NOT_CACHED."""
        return await self._models.verify(ref)

    async def cancel_model(self, ref: str) -> Operation:
        """Break off the pull, import or verification of a model; the operation that has ended so. Raises RequestError
        MODEL_NOT_BUSY.
        """
        return await self._models.cancel(ref)

    async def remove_model(self, ref: str) -> dict[str, Any]:
        """Delete a model from the cache. Raises RequestError MODEL_IN_USE or MODEL_NOT_CACHED."""
        return await self._models.remove(ref)

    async def pin_model(self, ref: str, *, pinned: bool = True) -> dict[str, Any]:
        """Never have a model deleted, or have that be over; its row. Raises RequestError MODEL_NOT_CACHED."""
        return await self._models.pin(ref, pinned=pinned)

    async def plan_model_gc(self, older_than_s: float | None = None) -> dict[str, Any]:
        """What ``collect_models`` would delete of the cache, and why each of the others stays. Raises NodeError."""
        return await self._models.gc.plan(older_than_s)

    async def collect_models(self, older_than_s: float | None = None) -> dict[str, Any]:
        """Delete models that nobody has needed for ``older_than_s`` (absent: models.gc.keep_days, and no more than
        models.max_bytes makes go), and what is left of downloads. Raises NodeError.
        """
        return await self._models.gc.run(older_than_s)

    def model_figures(self) -> dict[str, int] | None:
        """How many bytes and models the cache had when it was last looked at; None before that."""
        return self._models.gc.figures
