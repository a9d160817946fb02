"""``models pin``, ``unpin`` and ``gc``: what stays in the cache, and what goes."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from pool_managerd.cli.exits import USAGE, CommandFailed
from pool_managerd.cli.models import Ref
from pool_managerd.cli.options import ConfigFile, Output, Url, daemon, seconds
from pool_managerd.cli.output import Format, Json, printable, show
from pool_managerd.cli.table import Column, table
from pool_managerd.core.narration import size

DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be deleted, and why the rest stays; nothing is.")]
OlderThan = Annotated[
    str | None,
    typer.Option(
        "--older-than", metavar="TIME", show_default=False,
        help="Delete all that nobody has needed for so long, such as 7d. Absent: models.gc.keep_days, and no more than"
        " models.max_bytes makes go, where it is set.",
    ),
]  # fmt: skip


def pin(ref: Ref, url: Url = None, config: ConfigFile = None, output: Output = Format.TABLE) -> None:
    """Never delete a model from the cache, until `unpin`."""
    show(daemon(url, config).request("POST", "models", "pin", body={"ref": ref}), output, _pinned)


def unpin(ref: Ref, url: Url = None, config: ConfigFile = None, output: Output = Format.TABLE) -> None:
    """Let a model go again when nobody needs it."""
    show(daemon(url, config).request("POST", "models", "unpin", body={"ref": ref}), output, _pinned)


def gc(
    dry_run: DryRun = False, older_than: OlderThan = None, url: Url = None, config: ConfigFile = None,
    output: Output = Format.TABLE,
) -> None:  # fmt: skip
    """Delete from the cache what nobody needs.

    What a pool needs, a pin keeps or is being fetched stays, and so does what was needed a short while ago. What goes first is
    what was left unneeded for longest.
    """
    if older_than is not None and older_than[-1:].isdecimal():
        hint = f"write {older_than[:12]}d for days"
        raise CommandFailed(f"cannot use --older-than {older_than[:40]!r}: it says no unit", USAGE, hint=hint)
    age_s = seconds(older_than, "--older-than")
    body = {} if age_s is None else {"older_than_ms": round(age_s * 1000)}
    answer: Json = daemon(url, config).request("POST", "models", "gc", body=body, query={"dry_run": dry_run})
    show(answer, output, lambda found: _collected(found, dry_run=dry_run, wide=output is Format.WIDE))


def _pinned(row: Json) -> None:
    said = "is pinned: it stays" if row["pinned"] else "is not pinned: it goes when nobody needs it"
    sys.stdout.write(printable(f"{row['ref']} {said}") + "\n")


def _collected(answer: Json, *, dry_run: bool, wide: bool) -> None:
    columns = (
        Column("", 0), Column("NAME", 0, least=20, middle=True), Column("SIZE", 1), Column("WHY", 0, least=24, lines=3),
    )  # fmt: skip
    verbs = {"delete": "delete" if dry_run else "deleted", "keep": "keep"}
    cells = ((verbs[row["action"]], row["name"], size(row["size_bytes"]), row["why"]) for row in answer["rows"])
    table(columns, cells, empty="nothing is in the cache", wide=wide)
    freed = size(answer["freed_bytes"])
    most = "" if answer["max_bytes"] is None else f" of {size(answer['max_bytes'])}"
    sys.stdout.write(f"{freed} {'would be freed' if dry_run else 'freed'}; {size(answer['used_bytes'])}{most} were used\n")
