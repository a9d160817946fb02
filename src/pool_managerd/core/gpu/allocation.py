"""On which GPUs one launch runs, and how much of each it reserves: mask, groups, split and ledger in one pure question."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Literal

from pool_managerd.core.gpu import tensor_parallel
from pool_managerd.core.gpu.accounts import DeviceAccount, Reservation, without
from pool_managerd.core.gpu.groups import Group, best_first
from pool_managerd.core.gpu.ledger import Ledger
from pool_managerd.core.gpu.masks import cuda_environment, cuda_visible_devices, in_pci_order
from pool_managerd.core.gpu.split import SplitPlan
from pool_managerd.core.instance_id import InstanceId
from pool_managerd.core.memory.estimator import LaunchEstimator
from pool_managerd.errors import NodeError, PoolError

MAX_TRIES = 32
"""Groups of several devices that are tried of each width: they come best first, so that the rest is worse."""

Split = Literal["auto"] | tuple[float, ...] | None


@dataclass(frozen=True, slots=True)
class Allocation:
    """The devices that one launch was given, in PCI order, and its reservation on each in bytes by UUID.

    ``shares`` say which part of the model each of several devices carries. The engine is told them, as what it would
    choose by itself is not what was reserved. ``notices`` are human-readable.
    """

    devices: Group
    bytes_by_device: Mapping[str, int]
    shares: tuple[float, ...] = ()
    notices: tuple[str, ...] = ()

    def environment(self) -> dict[str, str]:
        """Shows an engine these devices alone, by UUID."""
        return cuda_environment(cuda_visible_devices(self.devices))


@dataclass(frozen=True, slots=True)
class AllocationRequest:
    """What the pool's configuration says. ``devices`` is its mask in the order written, None when any of ``candidates`` will do.

    ``split``: by request over several devices, with a share per device or automatic. Without ``enforce`` a start that
    does not fit is only warned of. ``reserved_by_masks`` are devices that other pools must have: taken last.
    """

    instance_id: InstanceId
    epoch: int
    candidates: Group
    devices: Group | None = None
    split: Split = None
    exclusive: bool = False
    enforce: bool = True
    reserved_by_masks: frozenset[str] = frozenset()


def allocate(
    launch: LaunchEstimator, wanted: AllocationRequest, ledger: Ledger, accounts: Mapping[str, DeviceAccount]
) -> Allocation:
    """Choose devices and reserve memory on them, in one call.

    The mask is the only group of devices to try, without one those of `_groups`, best first. There are three cases:

    1. A group has room: the first such is reserved.
    2. None has, and the operator wants to be warned only: what is left on the nearest group is reserved, never more.
    3. None has: raises NodeError INSUFFICIENT_VRAM or GPU_NOT_SHARED of the nearest group, the one that lacks least,
       GPU_UNAVAILABLE where there is no group at all; SpecError for a split that cannot be. Trying again helps where it
       would for any of them.
    """
    if launch.inputs.divides_equally:
        tensor_parallel.check(launch.inputs, len(wanted.devices or ()), wanted.split)
    free = {uuid: without(account, wanted.instance_id).available_bytes for uuid, account in accounts.items()}
    nearest: tuple[tuple[bool, float], NodeError, Allocation] | None = None
    again = False
    for devices in _groups(launch, wanted, free):
        objection: NodeError | None
        cannot_be = False
        try:
            option = _share_out(launch, wanted, devices, free)
            objection = ledger.objection(_reservation(launch, wanted, option), accounts)
        except NodeError as error:
            option, objection, cannot_be = _unchecked(launch, wanted, devices, free), error, True
        if objection is None:  # 1
            ledger.reserve(_reservation(launch, wanted, option), accounts)
            return option
        rank, again = (cannot_be, _lacking(objection)), again or objection.retriable
        if nearest is None or rank < nearest[0]:
            nearest = rank, objection, option
    if nearest is None:
        raise _nothing_to_use(wanted)
    _, objection, option = nearest
    if not wanted.enforce and objection.code == "INSUFFICIENT_VRAM":  # 2
        return _as_much_as_there_is(wanted, option, ledger, accounts, objection)
    objection.retriable = again
    raise objection  # 3


def _lacking(objection: NodeError) -> float:
    """Bytes that are missing; of an objection of another kind, such as an exclusive neighbour, more than any."""
    needed, free = objection.details.get("needed_bytes"), objection.details.get("free_bytes")
    return math.inf if needed is None or free is None else needed - free


def _groups(launch: LaunchEstimator, wanted: AllocationRequest, free: Mapping[str, int]) -> Iterator[Group]:
    """Groups of devices to try, best first. Widths that have too little room altogether are left out, but for the last."""
    if wanted.devices is not None:
        yield wanted.devices
        return
    widths: Sequence[int] = (1,)
    if wanted.split == "auto":
        widths = range(1, max(1, sum(d.parent_uuid is None for d in wanted.candidates)) + 1)
        if launch.inputs.divides_equally:
            widths = [width for width in widths if tensor_parallel.divisible(launch.inputs, width)]
    elif wanted.split is not None:
        widths = (len(wanted.split),)
    room = sorted((free.get(d.uuid, 0) for d in wanted.candidates), reverse=True)
    for width in widths:
        if width == widths[-1] or sum(room[:width]) >= launch.estimate(width).gpu_bytes:
            found = best_first(wanted.candidates, free, width)
            last = sorted(found, key=lambda group: sum(d.uuid in wanted.reserved_by_masks for d in group))
            yield from islice(last, None if width == 1 else MAX_TRIES)


def _share_out(launch: LaunchEstimator, wanted: AllocationRequest, devices: Group, free: Mapping[str, int]) -> Allocation:
    """How much goes where; several devices share by the given ratios, or in proportion to their room."""
    if launch.inputs.divides_equally:
        used = tensor_parallel.used(launch.inputs, devices)
        plan = tensor_parallel.plan(launch, used)
        parts = launch.estimate_on(used).per_device(plan.ratios())
        rest = len(devices) - len(used)
        return _allocation(in_pci_order(devices), parts + (0,) * rest, plan.ratios() + (0.0,) * rest)
    if len(devices) == 1:
        return Allocation(devices, {devices[0].uuid: sum(launch.estimate_on(devices).per_device())})
    if launch.inputs.only_device is not None:
        return _on_one(launch, in_pci_order(devices), launch.inputs.only_device)
    whole = launch.estimate(len(devices))
    ratios = wanted.split if isinstance(wanted.split, tuple) else None
    plan = SplitPlan.compute(
        devices, whole.weights.size_bytes, kv_bytes=whole.kv.size_bytes, overhead_bytes=whole.fixed_bytes_per_gpu,
        ratios=ratios, free=free,
    )  # fmt: skip
    shares = plan.ratios()
    return _allocation(plan.devices, launch.estimate_on(plan.devices, shares).per_device(shares), shares)


def _on_one(launch: LaunchEstimator, devices: Group, place: int) -> Allocation:
    """An engine that is shown several GPUs and uses one of them: the others hold no more than its context."""
    chosen = devices[min(place, len(devices) - 1)]
    whole, idle = sum(launch.estimate_on((chosen,)).per_device()), launch.inputs.overhead_bytes
    parts = tuple(whole if d is chosen else idle for d in devices)
    return _allocation(devices, parts, tuple(float(d is chosen) for d in devices))


def _unchecked(launch: LaunchEstimator, wanted: AllocationRequest, devices: Group, free: Mapping[str, int]) -> Allocation:
    """The division that does not fit, for who wants to be warned only."""
    ordered = in_pci_order(devices)
    if launch.inputs.only_device is not None:
        return _on_one(launch, ordered, launch.inputs.only_device)
    room = [max(1, free.get(d.uuid, 0)) for d in ordered]
    if isinstance(wanted.split, tuple):
        given = {d.uuid: share for d, share in zip(devices, wanted.split, strict=True)}
        room = [max(1, round(given[d.uuid] * (1 << 40))) for d in ordered]
    shares = tuple(part / sum(room) for part in room)
    if launch.inputs.divides_equally:
        shares = (1 / len(ordered),) * len(ordered)
    return _allocation(ordered, launch.estimate_on(ordered, shares).per_device(shares), shares)


def _allocation(devices: Group, parts: tuple[int, ...], shares: tuple[float, ...]) -> Allocation:
    by_device = {d.uuid: part for d, part in zip(devices, parts, strict=True)}
    return Allocation(devices, by_device, shares)


def _reservation(launch: LaunchEstimator, wanted: AllocationRequest, option: Allocation) -> Reservation:
    """One memory is reserved once: on a GPU that uses RAM, what the engine needs of that beside it counts, too."""
    needed = dict(option.bytes_by_device)
    for device in option.devices[:1]:
        if device.unified:
            needed[device.uuid] += launch.estimate_on(option.devices, option.shares).host.size_bytes
    return Reservation(wanted.instance_id, wanted.epoch, needed, wanted.exclusive)


def _as_much_as_there_is(
    wanted: AllocationRequest, option: Allocation, ledger: Ledger, accounts: Mapping[str, DeviceAccount], why: PoolError
) -> Allocation:
    """The operator asked to be warned only: what is left is reserved, never more."""
    capped = {
        uuid: min(needed, without(accounts[uuid], wanted.instance_id).available_bytes)
        for uuid, needed in option.bytes_by_device.items()
    }
    ledger.reserve(Reservation(wanted.instance_id, wanted.epoch, capped, wanted.exclusive), accounts)
    notice = f"Started although it may not fit (gpu.fit is not enforce): {why.message.partition(': ')[2]}"
    return replace(option, bytes_by_device=capped, notices=(notice,))


def _nothing_to_use(wanted: AllocationRequest) -> NodeError:
    width = len(wanted.split) if isinstance(wanted.split, tuple) else 1
    return NodeError(
        f"cannot start pool {wanted.instance_id.pool_id}: it needs {width} usable GPU{'s' if width > 1 else ''}, and"
        f" {len(wanted.candidates)} can be used now",
        code="GPU_UNAVAILABLE", status=503, pool_id=wanted.instance_id.pool_id, hint="pool-managerd devices shows why",
    )  # fmt: skip
