"""What callers of the node ask of its GPUs: a part of the façade."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pool_managerd.config import Config
from pool_managerd.supervision.gpu.view import device_named, devices_view, yields_view
from pool_managerd.wiring.adapters import Adapters


class DeviceCalls:
    """Mixed into ``PoolManager``, whose ``config`` and adapters these are."""

    config: Config
    _a: Adapters

    def devices(self) -> dict[str, Any]:
        """Every GPU as it was last seen, with who holds what of its memory."""
        return devices_view(self._a.gpus, self._a.clock, self._a.gpu_parts.ram(), simulated=self.config.gpu.simulate is not None)

    async def cordon(self, device: str) -> dict[str, Any]:
        """Nothing new starts on ``device`` (index or UUID), durably; its row. Raises RequestError DEVICE_NOT_FOUND."""
        await self._a.gpus.watch.cordon(device)
        return device_named(self.devices(), device)

    async def uncordon(self, device: str) -> dict[str, Any]:
        """Use it again: ends a cordon, a quarantine and a probation."""
        await self._a.gpus.watch.uncordon(device)
        return device_named(self.devices(), device)

    def yields(self) -> list[dict[str, Any]]:
        """The GPUs that are left to others for a while, with the pools that are still there."""
        return yields_view(self._a.gpus)

    async def yield_gpus(self, devices: Sequence[str] = (), for_ms: int | None = None) -> list[dict[str, Any]]:
        """Leave these GPUs (index or UUID; all when empty) to others, for so long or until ``end_yield``, durably: what is idle
        there goes, what is in use when its requests have ended, and nothing starts. Then pools that run with the daemon come
        back. What is left to others now. Raises RequestError DEVICE_NOT_FOUND, NodeError.
        """
        await self._a.gpus.yields.begin(devices, None if for_ms is None else for_ms / 1000)
        return self.yields()

    async def end_yield(self, devices: Sequence[str] = ()) -> list[dict[str, Any]]:
        """Use these GPUs (all when empty) again; what is still left to others. Raises as ``yield_gpus``."""
        await self._a.gpus.yields.end(devices)
        return self.yields()

    async def preflight(self) -> dict[str, Any]:
        """Whether this machine can run what is configured, with a remedy for all that stands in the way (SPEC §7)."""
        return (await self._a.gpu_parts.preflight()).to_dict()

    async def release_devices(self) -> dict[str, Any]:
        """Release the driver's library, so that the driver can be replaced; nothing starts until ``resume_devices``."""
        await self._a.gpus.watch.release()
        return self.devices()

    async def resume_devices(self) -> dict[str, Any]:
        """Use the driver's library again, the one that is installed now."""
        await self._a.gpus.watch.resume()
        return self.devices()
