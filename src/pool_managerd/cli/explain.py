"""``explain``: what a start would do, or which pool would take a request, without doing either."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pool_managerd.cli import output as shown
from pool_managerd.cli.exits import NO, OK, REFUSED, USAGE, CommandFailed
from pool_managerd.cli.options import ConfigFile, OptionalPoolId, Output, Url, daemon
from pool_managerd.cli.output import Format, Json, show, span
from pool_managerd.cli.queue import would_lead_to
from pool_managerd.cli.table import write_lines

if TYPE_CHECKING:
    from pool_managerd.core.registry import PoolSnapshot
    from pool_managerd.core.registry.placement import Decision, PlacementRequest


def _wish(name: str, meaning: str) -> Any:
    return typer.Option(name, help=f"With --place: {meaning}", show_default=False)


Place = Annotated[bool, typer.Option("--place", help="Say which pool would take a request, and why the others would not.")]
Model = Annotated[
    str | None,
    typer.Option(
        "--model", help="What a request for it would lead to; with --place: the pool must serve this model.", show_default=False
    ),
]
Engine = Annotated[str | None, _wish("--engine", "the pool must run this engine.")]
Context = Annotated[
    int | None, typer.Option("--ctx", min=0, help="With --place: tokens that the request may fill.", show_default=False)
]
Quant = Annotated[str | None, _wish("--quant", "the model must have this quantisation, such as Q4_K_M.")]
Vram = Annotated[str | None, _wish("--vram", "so much must be free beside what is loaded, such as 4GiB.")]
Mask = Annotated[str | None, _wish("--device-mask", "the only GPUs that may be touched, such as 0,1 or UUIDs.")]
Pin = Annotated[str | None, _wish("--pin", "this pool or none.")]
Prefer = Annotated[list[str] | None, _wish("--prefer", "this pool comes first; may be repeated.")]
Avoid = Annotated[list[str] | None, _wish("--avoid", "this pool comes last; may be repeated.")]
NoFallback = Annotated[bool, _wish("--no-fallback", "nothing but the preferred, and nothing avoided.")]


def explain(
    pool_id: OptionalPoolId = None,
    place: Place = False,
    model: Model = None,
    engine: Engine = None,
    ctx: Context = None,
    quant: Quant = None,
    vram: Vram = None,
    device_mask: Mask = None,
    pin: Pin = None,
    prefer: Prefer = None,
    avoid: Avoid = None,
    no_fallback: NoFallback = False,
    url: Url = None,
    config: ConfigFile = None,
    output: Output = Format.TABLE,
) -> None:
    """Say what a start would do, or what is in its way.

    With --model alone: what a request for that model would lead to, what would be stopped for it, and how long that takes.
    With --place: which pool would take a request. Nothing is done. Exits 1 when a start would be refused, or no pool can take it.
    """
    wishes = {
        "model": model, "engine": engine, "ctx": ctx, "quant": quant, "vram": vram, "device-mask": device_mask, "pin": pin,
        "prefer": prefer, "avoid": avoid, "no-fallback": no_fallback or None,
    }  # fmt: skip
    if not place and pool_id is None and model is not None:
        wishes["model"] = None
        _only_with_place(wishes)
        would_lead_to(daemon(url, config), model, output)
        return
    if not place:
        _only_with_place(wishes)
        _starts(daemon(url, config), pool_id, output)
        return
    if pool_id is not None:
        hint = f"leave {pool_id!r} out, or write --pin {pool_id}"
        raise CommandFailed("cannot place a request and explain one pool at once", USAGE, hint=hint)
    request = _request(wishes)
    _place(daemon(url, config).get("snapshots"), request, output)


# --- what a start would do ---


def _starts(node: Any, pool_id: str | None, output: Format) -> None:
    wanted = [pool["pool_id"] for pool in node.get("pools")] if pool_id is None else [pool_id]
    found = [node.get("pools", one, "explain") for one in wanted]
    show(found[0] if pool_id is not None else found, output, lambda _: _steps(found))
    raise typer.Exit(NO if any(answer.get("blockers") or answer.get("problems") for answer in found) else OK)


def _steps(explanations: list[Json]) -> None:
    write_lines(line for answer in explanations for line in _explained(answer))


def _explained(answer: Json) -> Iterator[str]:
    """What stands in the way is said once: in the first line when it is one thing, else one below the other."""
    problems = answer.get("problems") or [{"message": blocker} for blocker in answer.get("blockers", [])]
    yield answer["would"] if len(problems) < 2 else f"Pool '{answer['pool_id']}' would not start, for {len(problems)} reasons"
    for step in answer.get("steps", []):
        yield f"  - {step.get('kind')}: {step.get('detail')}" if isinstance(step, dict) else f"  - {step}"
    for problem in problems:
        if len(problems) > 1:
            yield f"  ! {problem['message']}"
        if problem.get("hint"):
            yield f"{'    ' if len(problems) > 1 else '  '}hint: {problem['hint']}"


# --- who would take a request ---


def _only_with_place(wishes: Mapping[str, Any]) -> None:
    if given := [f"--{name}" for name, value in wishes.items() if value is not None]:
        verb = "only means something" if len(given) == 1 else "only mean something"
        raise CommandFailed(f"cannot use {', '.join(given)}: it {verb} with --place", USAGE, hint="add --place")


def _request(wishes: Mapping[str, Any]) -> PlacementRequest:
    """What the options ask for. Raises CommandFailed (2) for a size or a mask that cannot be read."""
    from pool_managerd.core.gpu.masks import DeviceMask
    from pool_managerd.core.registry.placement import PlacementRequest
    from pool_managerd.errors import SpecError

    if both := sorted({*(wishes["prefer"] or ())} & {*(wishes["avoid"] or ())}):
        raise CommandFailed(f"cannot prefer and avoid pool {both[0]!r} at once", USAGE, hint="leave one of the two out")
    mask = wishes["device-mask"]
    try:
        devices = None if mask is None else DeviceMask.parse(mask)
    except SpecError as error:
        raise CommandFailed(error.message, USAGE, hint="write --device-mask 0,1, or UUIDs as nvidia-smi -L shows them") from error
    return PlacementRequest(
        wishes["model"], wishes["engine"], wishes["quant"], wishes["ctx"] or 0, _bytes(wishes["vram"]), devices, wishes["pin"],
        tuple(wishes["prefer"] or ()), tuple(wishes["avoid"] or ()), not wishes["no-fallback"],
    )  # fmt: skip


def _bytes(text: str | None) -> int:
    """``4GiB`` as bytes. Raises CommandFailed (2)."""
    from pool_managerd.core.narration import parse_size

    try:
        return 0 if text is None else parse_size(text)
    except ValueError as error:
        raise CommandFailed(f"cannot use --vram: {error}", USAGE, hint="write --vram 4GiB") from error


def _place(answer: Any, request: PlacementRequest, output: Format) -> None:
    from pool_managerd.core.registry.placement import decide

    pools = _pools(answer)
    decision = decide(request, pools)
    for notice in _notices(request, pools):
        shown.error(notice)

    lines = (*_stale(answer), *_sentences(decision, request, pools))
    show(_to_json(decision, request, pools, answer), output, lambda _: write_lines(lines))
    raise typer.Exit(OK if decision.pool_id is not None else NO)


def _pools(answer: Any) -> list[PoolSnapshot]:
    from pool_managerd.core.registry import PoolSnapshot
    from pool_managerd.errors import SpecError

    rows = answer.get("pools") if isinstance(answer, dict) else None
    try:
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise SpecError("cannot read the daemon's snapshots: they are no list of pools")
        return [PoolSnapshot.from_dict(row) for row in rows]
    except SpecError as error:
        raise CommandFailed(error.message, REFUSED, hint="does a pool-managerd answer at this address?") from error


def _notices(request: PlacementRequest, pools: Sequence[PoolSnapshot]) -> Iterator[str]:
    """Names that mean nothing here: most likely they are misspelt."""
    for name in sorted({*request.prefer, *request.avoid} - {pool.pool_id for pool in pools}):
        yield f"there is no pool {name!r}"
    there = {name.lower() for pool in pools for share in pool.devices for name in (share.device, share.uuid)}
    for item in request.device_mask.items if request.device_mask is not None else ():
        if str(item).lower() not in there:
            yield f"no pool may run on a device {item}"


def _stale(answer: Json) -> Iterator[str]:
    """That the metrics of the GPUs are not of now."""
    if answer.get("devices_stale"):
        age, problem = answer.get("devices_age_ms"), answer.get("devices_problem")
        when = f"last read {span(age)} ago" if isinstance(age, int) else "never read"
        why = problem.get("message") if isinstance(problem, dict) else None
        yield f"The metrics of the GPUs are stale, {when}: {why or 'the GPUs cannot be read'}"


def _to_json(decision: Decision, request: PlacementRequest, pools: Sequence[PoolSnapshot], answer: Json) -> Json:
    from dataclasses import asdict

    by_id = {pool.pool_id: pool for pool in pools}
    candidates = [
        {
            **asdict(candidate), "vram_room_bytes": pool.vram_room_bytes, "vram_free_bytes": pool.vram_free_bytes,
            "active_leases": pool.active_leases, "preferred": pool.pool_id in request.prefer,
            "avoided": pool.pool_id in request.avoid, "chosen": pool.pool_id == decision.pool_id,
        }
        for candidate in decision.candidates
        for pool in [by_id[candidate.pool_id]]
    ]  # fmt: skip
    ages = {key: answer.get(key) for key in ("devices_stale", "devices_age_ms", "devices_problem")}
    return {**asdict(decision), "candidates": candidates, "snapshot_version": answer.get("version"), **ages}


def _sentences(decision: Decision, request: PlacementRequest, pools: Sequence[PoolSnapshot]) -> Iterator[str]:
    by_id = {pool.pool_id: pool for pool in pools}
    yield decision.why
    width = min(32, max((len(c.pool_id) for c in decision.candidates), default=0))
    for candidate in decision.candidates:
        name = candidate.pool_id
        if candidate.objection is not None:
            yield f"  ! {name:<{width}}  {candidate.objection}"
            continue
        marks = [word for word, named in (("preferred", request.prefer), ("to be avoided", request.avoid)) if name in named]
        facts = "; ".join([_standing(by_id[name]), *marks])
        yield f"  {'*' if name == decision.pool_id else '-'} {name:<{width}}  {facts}"


def _standing(pool: PoolSnapshot) -> str:
    """What the order of the feasible pools goes by."""
    from pool_managerd.core.narration import count, size

    free = "no GPU" if pool.vram_room_bytes is None else f"{size(pool.vram_room_bytes)} of VRAM free for it"
    return f"{free}, {count(pool.active_leases, 'lease')}"
