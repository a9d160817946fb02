"""``import``: the configuration of another tool as ours, and what became of each of its keys."""

from __future__ import annotations

import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pool_managerd.cli.exits import NO, USAGE, CommandFailed
from pool_managerd.cli.options import Output
from pool_managerd.cli.output import Format, printable, show
from pool_managerd.cli.table import Column, table

if TYPE_CHECKING:
    from pool_managerd.moving.document import Moved
    from pool_managerd.moving.draft import Surroundings

File = Annotated[Path, typer.Argument(metavar="FILE", help="The other tool's configuration file.", show_default=False)]
Out = Annotated[Path | None, typer.Option("--out", metavar="FILE", help="Write the YAML there.", show_default=False)]
Force = Annotated[bool, typer.Option("--force", help="Write over a file that is there.")]
_COLUMNS = (Column("LINE"), Column("KEY", least=26, middle=True), Column("BECAME"), Column("WHERE, OR WHY", least=30, lines=12))


def import_llama_swap(file: File, out: Out = None, force: Force = False, output: Output = Format.TABLE) -> None:
    """Write a llama-swap configuration as one of ours.

    The YAML goes to the standard output or to --out, a report on every key to stderr. Exits 1 when something was dropped: the
    YAML is written all the same. Macros such as ${env.HOME} are expanded with the environment of this shell.
    """
    from pool_managerd.moving.llama_swap import convert

    _import(file, out, force, output, lambda text, around: convert(text, str(file), os.environ, around))


def import_presets(file: File, out: Out = None, force: Force = False, output: Output = Format.TABLE) -> None:
    """Write llama.cpp's presets as our configuration.

    FILE is what llama.cpp's router is started with: llama-server --models-preset FILE. The YAML goes to the standard output or to
    --out, a report on every key to stderr. Exits 1 when something was dropped: the YAML is written all the same.
    """
    from pool_managerd.moving.presets import convert

    _import(file, out, force, output, lambda text, around: convert(text, str(file), around))


def _import(file: Path, out: Path | None, force: bool, output: Format, convert: Callable[[str, Surroundings], Moved]) -> None:
    from pool_managerd.config.parse import read_bounded
    from pool_managerd.moving.draft import Surroundings
    from pool_managerd.wiring.imported_flags import flag_of_key, read_flags

    if out is not None and not force and os.path.lexists(out):
        raise CommandFailed(f"cannot write {out}: it is there already", USAGE, hint="name another one, or add --force")
    try:
        text = read_bounded(file)
    except ValueError as error:
        raise CommandFailed(f"{file}: {error}", USAGE) from error
    moved = convert(text, Surroundings(shutil.which, read_flags, flag_of_key))
    if out is not None:
        _write(out, moved.text, force)
    _tell(moved, out, output)
    raise typer.Exit(NO if moved.dropped else 0)


def _write(out: Path, text: str, force: bool) -> None:
    try:
        with out.open("w" if force else "x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise CommandFailed(f"cannot write {out}: {error.strerror or error}", USAGE) from error


def _tell(moved: Moved, out: Path | None, output: Format) -> None:
    found = [
        {"line": one.line, "key": one.key, "outcome": one.outcome.value, "to": one.to or None, "why": one.why or None}
        for one in moved.findings
    ]
    if output is Format.JSON:
        answer: dict[str, Any] = {"out": None if out is None else str(out), "dropped": moved.dropped, "findings": found}
        show(answer | ({"yaml": moved.text} if out is None else {}), output, lambda _: None)
        return
    if out is None:
        sys.stdout.write(moved.text)
        sys.stdout.flush()
    rows = ((one.line, one.key, one.outcome.value, one.text.replace("pools[].", "")) for one in moved.findings)
    table(_COLUMNS, rows, empty="", wide=output is Format.WIDE, to=sys.stderr)
    counts = Counter(one.outcome.value for one in moved.findings)
    summary = ", ".join(f"{counts[name]} {name}" for name in ("mapped", "kept", "needless", "dropped"))
    sys.stderr.write(f"\n{summary}{f'; written to {printable(str(out))}' if out is not None else ''}\n")
    check = f" {printable(str(out))}" if out is not None else " FILE"
    sys.stderr.write(f"next: pool-managerd config check --deep{check}\n")
