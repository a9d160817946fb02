"""Which GPUs one start gets, and how much of each: mask, choice, split and ledger together, in one pure question."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Literal

from pool_managerd.core.gpu import tensor_parallel
from pool_managerd.core.gpu.choice import groups
from pool_managerd.core.gpu.devices import DeviceSnapshot
from pool_managerd.core.gpu.ledger import Assignment, DeviceAccount, Ledger, Reservation, without
from pool_managerd.core.gpu.masks import in_pci_order
from pool_managerd.core.gpu.split import SplitPlan
from pool_managerd.core.memory.sizing import LaunchSizing
from pool_managerd.errors import NodeError, PoolError

MAX_TRIES = 32
"""Groups of several devices that are tried of each width: they come best first, so that the rest is worse."""

Split = Literal["auto"] | tuple[float, ...] | None


@dataclass(frozen=True, slots=True)
class Wish:
    """What the pool's configuration says. ``devices`` is its mask in the order written, None when any of ``candidates`` will do.

    ``split``: by request over several devices, with a share per device or automatic. Without ``enforce`` a start that
    does not fit is only warned of. ``spoken_for`` are devices that other pools must have: taken last.
    """

    pool_id: str
    epoch: int
    candidates: tuple[DeviceSnapshot, ...]
    devices: tuple[DeviceSnapshot, ...] | None = None
    split: Split = None
    exclusive: bool = False
    enforce: bool = True
    spoken_for: frozenset[str] = frozenset()


def assign(sizing: LaunchSizing, wish: Wish, ledger: Ledger, accounts: Mapping[str, DeviceAccount]) -> Assignment:
    """Choose and promise in one call. Raises NodeError INSUFFICIENT_VRAM or GPU_NOT_SHARED, SpecError for a split that cannot be.

    Without a mask the first group of devices that has room, best first; a single one unless a split is asked for.
    """
    if sizing.facts.divides_equally:
        tensor_parallel.check(sizing.facts, len(wish.devices or ()), wish.split)
    free = {uuid: without(account, wish.pool_id).available_bytes for uuid, account in accounts.items()}
    nearest: tuple[tuple[bool, float], NodeError, Assignment] | None = None
    for devices in _options(sizing, wish, free):
        objection: NodeError | None
        cannot_be = False
        try:
            option = _share_out(sizing, wish, devices, free)
            objection = ledger.objection(_promise(sizing, wish, option), accounts)
        except NodeError as error:
            option, objection, cannot_be = _unchecked(sizing, wish, devices, free), error, True
        if objection is None:
            ledger.reserve(_promise(sizing, wish, option), accounts)
            return option
        rank = (cannot_be, _lacking(objection))
        if nearest is None or rank < nearest[0]:
            nearest = rank, objection, option
    if nearest is None:
        raise _nothing_to_use(wish)
    _, objection, option = nearest
    if not wish.enforce and objection.code == "INSUFFICIENT_VRAM":
        return _as_much_as_there_is(wish, option, ledger, accounts, objection)
    raise objection


def _lacking(objection: NodeError) -> float:
    """Bytes that are missing; of an objection of another kind, such as an exclusive neighbour, more than any."""
    needed, free = objection.details.get("needed_bytes"), objection.details.get("free_bytes")
    return math.inf if needed is None or free is None else needed - free


def _options(sizing: LaunchSizing, wish: Wish, free: Mapping[str, int]) -> Iterator[tuple[DeviceSnapshot, ...]]:
    """Groups of devices to try, best first. Widths that have too little room altogether are left out, but for the last."""
    if wish.devices is not None:
        yield wish.devices
        return
    widths: Sequence[int] = (1,)
    if wish.split == "auto":
        widths = range(1, max(1, sum(d.parent_uuid is None for d in wish.candidates)) + 1)
        if sizing.facts.divides_equally:
            widths = [width for width in widths if tensor_parallel.divisible(sizing.facts, width)]
    elif wish.split is not None:
        widths = (len(wish.split),)
    room = sorted((free.get(d.uuid, 0) for d in wish.candidates), reverse=True)
    for width in widths:
        if width == widths[-1] or sum(room[:width]) >= sizing.footprint(width).gpu_bytes:
            found = groups(wish.candidates, free, width)
            last = sorted(found, key=lambda group: sum(d.uuid in wish.spoken_for for d in group))
            yield from islice(last, None if width == 1 else MAX_TRIES)


def _share_out(sizing: LaunchSizing, wish: Wish, devices: tuple[DeviceSnapshot, ...], free: Mapping[str, int]) -> Assignment:
    """How much goes where; several devices share by the given ratios, or in proportion to their room."""
    if sizing.facts.divides_equally:
        used = tensor_parallel.used(sizing.facts, devices)
        plan = tensor_parallel.plan(sizing, used)
        parts = sizing.footprint_on(used).per_device(plan.ratios())
        rest = len(devices) - len(used)
        return _assigned(in_pci_order(devices), parts + (0,) * rest, plan.ratios() + (0.0,) * rest)
    if len(devices) == 1:
        return Assignment(devices, {devices[0].uuid: sum(sizing.footprint_on(devices).per_device())})
    if sizing.facts.only_device is not None:
        return _on_one(sizing, in_pci_order(devices), sizing.facts.only_device)
    whole = sizing.footprint(len(devices))
    ratios = wish.split if isinstance(wish.split, tuple) else None
    plan = SplitPlan.compute(
        devices, whole.weights.size_bytes, kv_bytes=whole.kv.size_bytes, overhead_bytes=whole.fixed_bytes_per_gpu,
        ratios=ratios, free=free,
    )  # fmt: skip
    shares = plan.ratios()
    return _assigned(plan.devices, sizing.footprint_on(plan.devices, shares).per_device(shares), shares)


def _on_one(sizing: LaunchSizing, devices: tuple[DeviceSnapshot, ...], place: int) -> Assignment:
    """An engine that is shown several GPUs and uses one of them: the others hold no more than its context."""
    chosen = devices[min(place, len(devices) - 1)]
    whole, idle = sum(sizing.footprint_on((chosen,)).per_device()), sizing.facts.overhead_bytes
    parts = tuple(whole if d is chosen else idle for d in devices)
    return _assigned(devices, parts, tuple(float(d is chosen) for d in devices))


def _unchecked(sizing: LaunchSizing, wish: Wish, devices: tuple[DeviceSnapshot, ...], free: Mapping[str, int]) -> Assignment:
    """The division that does not fit, for who wants to be warned only."""
    ordered = in_pci_order(devices)
    if sizing.facts.only_device is not None:
        return _on_one(sizing, ordered, sizing.facts.only_device)
    room = [max(1, free.get(d.uuid, 0)) for d in ordered]
    if isinstance(wish.split, tuple):
        given = {d.uuid: share for d, share in zip(devices, wish.split, strict=True)}
        room = [max(1, round(given[d.uuid] * (1 << 40))) for d in ordered]
    shares = tuple(part / sum(room) for part in room)
    if sizing.facts.divides_equally:
        shares = (1 / len(ordered),) * len(ordered)
    return _assigned(ordered, sizing.footprint_on(ordered, shares).per_device(shares), shares)


def _assigned(devices: tuple[DeviceSnapshot, ...], parts: tuple[int, ...], shares: tuple[float, ...]) -> Assignment:
    by_device = {d.uuid: part for d, part in zip(devices, parts, strict=True)}
    return Assignment(devices, by_device, shares)


def _promise(sizing: LaunchSizing, wish: Wish, option: Assignment) -> Reservation:
    """One memory is promised once: on a GPU that uses the machine's, what the engine needs of that beside it counts, too."""
    needed = dict(option.bytes_by_device)
    for device in option.devices[:1]:
        if device.unified:
            needed[device.uuid] += sizing.footprint_on(option.devices, option.shares).host.size_bytes
    return Reservation(wish.pool_id, wish.epoch, needed, wish.exclusive)


def _as_much_as_there_is(
    wish: Wish, option: Assignment, ledger: Ledger, accounts: Mapping[str, DeviceAccount], why: PoolError
) -> Assignment:
    """The operator asked to be warned only: what is left is promised, never more."""
    capped = {
        uuid: min(wanted, without(accounts[uuid], wish.pool_id).available_bytes)
        for uuid, wanted in option.bytes_by_device.items()
    }
    ledger.reserve(Reservation(wish.pool_id, wish.epoch, capped, wish.exclusive), accounts)
    notice = f"Started although it may not fit (gpu.fit is not enforce): {why.message.partition(': ')[2]}"
    return replace(option, bytes_by_device=capped, notices=(notice,))


def _nothing_to_use(wish: Wish) -> NodeError:
    width = len(wish.split) if isinstance(wish.split, tuple) else 1
    return NodeError(
        f"cannot start pool {wish.pool_id}: it needs {width} usable GPU{'s' if width > 1 else ''}, and"
        f" {len(wish.candidates)} can be used now",
        code="GPU_UNAVAILABLE", status=503, pool_id=wish.pool_id, hint="pool-managerd devices shows why",
    )  # fmt: skip
