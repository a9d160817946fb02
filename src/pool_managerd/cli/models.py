"""``models``: what the cache has, fetched beforehand, verified, removed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from pool_managerd.cli.client import Daemon
from pool_managerd.cli.exits import NO, CommandFailed
from pool_managerd.cli.options import ConfigFile, Output, Url, daemon
from pool_managerd.cli.output import Format, Json, moment, printable, show
from pool_managerd.cli.progress import wait_for
from pool_managerd.cli.table import Column, table
from pool_managerd.core.narration import size

Ref = Annotated[str, typer.Argument(metavar="REF", help="hf:ORG/REPO/FILE, hf:ORG/REPO:QUANTISATION, https://… or ollama:NAME")]
OptionalRef = Annotated[str | None, typer.Argument(metavar="[REF]", help="One model; all when absent.", show_default=False)]
ASKING_S = 600.0
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be fetched, and how much that is; nothing is.")]


Everywhere = Annotated[bool, typer.Option("--all", help="Also those that other tools have on the daemon's machine.")]
File = Annotated[Path, typer.Argument(metavar="FILE", help="A GGUF file; of a split model its first part.", show_default=False)]
Name = Annotated[
    str | None,
    typer.Option("--as", metavar="NAME", help="What pools will call it: a NAME, or hf:ORG/REPO/FILE.", show_default=False),
]
Sha256 = Annotated[
    list[str] | None, typer.Option("--sha256", metavar="HEX", help="What it must be; once for each part.", show_default=False)
]


def ls(everywhere: Everywhere = False, url: Url = None, config: ConfigFile = None, output: Output = Format.TABLE) -> None:
    """List the models that were fetched, and the pools that use them."""
    wide = output is Format.WIDE
    rows = daemon(url, config).request("GET", "models", query={"all": True} if everywhere else None)
    show(rows, output, lambda rows: _everywhere(rows, wide=wide) if everywhere else _listed(rows, wide=wide))


def pull(ref: Ref, dry_run: DryRun = False, url: Url = None, config: ConfigFile = None, output: Output = Format.TABLE) -> None:
    """Fetch a model into the cache, before a pool needs it.

    What the network cuts off goes on where it was, also with the next pull. Ctrl-C leaves the daemon at it: `models cancel`.
    """
    node = daemon(url, config)
    asking = replace(node, timeout_s=ASKING_S)  # a hub that does not answer is asked again and again
    sys.stderr.write(printable(f"looking for {ref}") + "\n")
    plan: Json = asking.request("POST", "models", "pull", body={"ref": ref}, query={"dry_run": True})
    if dry_run:
        return show(plan, output, _plan)
    if plan.get("tool"):
        sys.stderr.write(
            printable(f"verifying {_amount(plan)} that {plan['tool']} has: {', '.join(plan.get('files') or ())}") + "\n"
        )
    elif not plan.get("present"):
        sys.stderr.write(printable(f"fetching {_amount(plan)}: {', '.join(plan.get('files') or ())}") + "\n")
        sys.stderr.writelines(printable(line) + "\n" for line in _foreseen(plan))
    ended = _ended(node, node.request("POST", "models", "pull", body={"ref": ref}))
    return show(ended["outcome"], output, _fetched)


def import_(
    file: File, name: Name = None, sha256: Sha256 = None, url: Url = None, config: ConfigFile = None,
    output: Output = Format.TABLE,
) -> None:  # fmt: skip
    """Bring a model file of the daemon's machine into the cache. The file itself stays as it is.

    Pools then use it as local:NAME, or as the reference that --as says.
    """
    digests = [one if one.startswith("sha256:") else f"sha256:{one}" for one in sha256 or ()]
    node, body = daemon(url, config), {"path": str(file.absolute()), "name": name, "digests": digests}
    ended = _ended(node, node.request("POST", "models", "import", body=body), "copying")
    return show(ended["outcome"], output, _imported)


def verify(ref: OptionalRef = None, url: Url = None, config: ConfigFile = None, output: Output = Format.TABLE) -> None:
    """Hash models in the cache anew: whether they still are what was fetched. Exit code 1 where one is not."""
    node = daemon(url, config)
    refs = [ref] if ref is not None else [row["ref"] for row in node.get("models")]
    found = [_ended(node, node.request("POST", "models", "verify", body={"ref": one}))["outcome"] for one in refs]
    show(found, output, _verified)
    if not all(one["ok"] for one in found):
        raise CommandFailed(
            "some models are not what was fetched", NO, hint="a start of a pool, or `models pull`, fetches them again"
        )


def cancel(ref: Ref, url: Url = None, config: ConfigFile = None, output: Output = Format.TABLE) -> None:
    """Break off the pull, import or verification of a model. What was fetched by then is kept for the next pull."""
    show(daemon(url, config).request("POST", "models", "cancel", body={"ref": ref}), output, _cancelled)


def rm(ref: Ref, url: Url = None, config: ConfigFile = None, output: Output = Format.TABLE) -> None:
    """Delete a model from the cache. Refused while a pool needs it, or it is pinned."""
    show(daemon(url, config).request("POST", "models", "remove", body={"ref": ref}), output, _removed)


def _ended(node: Daemon, operation: Json, doing: str = "fetching") -> Json:
    last = operation

    def pending() -> list[str]:
        nonlocal last
        last = node.get("operations", operation["operation_id"])
        return [_how_far(last.get("progress") or {}, doing)] if last.get("status") == "running" else []

    wait_for(pending)
    if last.get("status") == "failed":
        failure = last.get("error") or {}
        raise CommandFailed(str(failure.get("message")), NO, hint=failure.get("hint"), code=failure.get("code"))
    return last


def _how_far(progress: Json, doing: str) -> str:
    """Elsewhere than on a terminal each new sentence is a line: one for each tenth."""
    done, total = progress.get("done") or 0, progress.get("total") or 0
    terminal = sys.stderr.isatty()
    if not done or not (total or terminal):
        return doing
    if terminal:  # the figures first: a long name is cut
        name, _, figures = str(progress.get("human") or "").rpartition(": ")
        return f"{figures}: {name}"
    share = f"{10 * done // total * 10} % of {size(total)}"
    return f"{progress['doing']} {share}" if progress.get("doing") else share


def _listed(rows: list[Json], *, wide: bool) -> None:
    columns = (
        Column("MODEL", 0, least=24, middle=True), Column("SIZE", 1), Column("VERIFIED", 2), Column("USED", 3),
        Column("POOLS", 1, least=8), Column("PATH", 4, wide=True),
    )  # fmt: skip
    cells = (
        (
            row["ref"],
            size(row["size_bytes"]),
            _state(row),
            moment(row.get("last_used_ms"), short=True),
            _kept_by(row),
            row["path"],
        )
        for row in rows
    )
    table(columns, cells, empty="no models in the cache", wide=wide)


def _kept_by(row: Json) -> str | None:
    """The pools that need it; a pin keeps it, too."""
    return ", ".join([*row["pools"], *(["(pinned)"] if row.get("pinned") else [])]) or None


def _everywhere(rows: list[Json], *, wide: bool) -> None:
    columns = (
        Column("MODEL", 0, least=24, middle=True), Column("IN", 1), Column("SIZE", 1), Column("VERIFIED", 2),
        Column("POOLS", 1, least=8), Column("PROBLEM", 0, least=16, lines=2), Column("PATH", 3, wide=True),
    )  # fmt: skip
    cells = (
        (
            row["ref"], row["tool"] or "cache", size(row["size_bytes"]), _state(row), ", ".join(row["pools"]) or None,
            row["problem"], row["path"],
        )
        for row in rows
    )  # fmt: skip
    table(columns, cells, empty="no models in the cache, and none of other tools", wide=wide)


def _state(row: Json) -> str:
    return "changed" if not row["untouched"] else "yes" if row["verified"] else "no"


def _amount(plan: Json) -> str:
    return size(plan["size_bytes"]) if plan.get("size_bytes") is not None else "a model of unknown size"


def _plan(plan: Json) -> None:
    verb = "is there already:" if plan.get("present") else "would be fetched:"
    whose = f" that {plan['tool']} has: nothing is fetched if it is right" if plan.get("tool") else ""
    sys.stdout.write(printable(f"{plan['ref']} {verb} {_amount(plan)}{whose}") + "\n")
    sys.stdout.writelines(printable(f"  {name}") + "\n" for name in plan.get("files") or ())
    sys.stdout.writelines(printable(line) + "\n" for line in _foreseen(plan))


def _foreseen(plan: Json) -> Iterator[str]:
    """What its headers tell, which were read before any of it is fetched."""
    if plan.get("problem"):
        yield f"no engine could use it: {plan['problem']}"
    if plan.get("architecture"):
        trained = f"trained for {plan['ctx_train']} tokens of context" if plan.get("ctx_train") else None
        yield ", ".join(filter(None, (plan["architecture"], plan.get("quantization"), trained)))
    for fit in plan.get("fits") or ():
        whose = f"pool {fit['pool_id']}" if fit.get("pool_id") else f"with {fit['ctx']} tokens of context"
        yield f"{whose}: {fit['where'] if fit.get('where') else 'would not run now: ' + str(fit.get('problem'))}"
        yield from (f"  {part}" for part in fit.get("needs") or ())


def _fetched(row: Json) -> None:
    how = "verified" if row["verified"] else f"not verified: nobody said what it has to be ({row['digest']})"
    whose = f", as {row['tool']} has it" if row.get("tool") else ""
    sys.stdout.write(printable(f"{row['ref']} is there ({size(row['size_bytes'])}, {how}{whose})") + "\n")
    sys.stdout.write(printable(row["path"]) + "\n")


def _imported(row: Json) -> None:
    sys.stdout.write(printable(f"{row['ref']} is in the cache ({size(row['size_bytes'])}, {row['digest']})") + "\n")
    sys.stdout.write(printable(f"pools use it with `model: {row['ref']}`") + "\n")


def _verified(found: list[Json]) -> None:
    for one in found:
        said = "ok" if one["ok"] else f"changed: {', '.join(one['wrong'])}"
        sys.stdout.write(printable(f"{one['ref']}: {said}") + "\n")
    if not found:
        sys.stdout.write("no models in the cache\n")


def _cancelled(operation: Json) -> None:
    sys.stdout.write(f"{operation['kind'].replace('_', ' ')} {operation['operation_id']}: {operation['status']}\n")


def _removed(answer: Json) -> None:
    sys.stdout.write(printable(f"{answer['ref']} is removed: {size(answer['freed_bytes'])} freed") + "\n")
