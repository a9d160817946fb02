"""``preflight``: may it run on this machine, and what to type where it may not. Asks no daemon."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pool_managerd.cli.exits import NO, OK, USAGE, CommandFailed
from pool_managerd.cli.output import Format, Json, error, printable, show

if TYPE_CHECKING:
    from pool_managerd.config import Config

PreflightConfig = Annotated[
    Path | None,
    typer.Option("--config", help="Check this configuration; without it the home profile is checked.", show_default=False),
]
Simulated = Annotated[
    Path | None, typer.Option("--simulate-gpus", help="Topology file of simulated GPUs; profile dev only.", show_default=False)
]
FindingsFormat = Annotated[
    Format | None,
    typer.Option("--output", "-o", help="table or json; table on a terminal, json elsewhere.", show_default=False),
]
_MARKS = {"fail": "FAIL", "warn": "WARN", "overridden": "ALLOWED", "ok": "ok"}


def preflight(config: PreflightConfig = None, simulate_gpus: Simulated = None, output: FindingsFormat = None) -> None:
    """Check whether this machine can run engines.

    With a remedy for all that stands in the way. Exits 1 if it cannot.
    """
    report = _report(config, simulate_gpus)
    show(report, output or (Format.TABLE if sys.stdout.isatty() else Format.JSON), _lines)
    raise typer.Exit(OK if report["ok"] else NO)


def _report(path: Path | None, topology: Path | None) -> Json:
    from pool_managerd.errors import NodeError
    from pool_managerd.wiring import preflight as machine

    try:
        if path is None and topology is None:
            return machine.home_report(machine.scan_once, os.environ).to_dict()
        config = _load(path, topology)
        return machine.preflight_report(config, lambda: machine.scan_once(config), os.environ, error).to_dict()
    except NodeError as problem:  # this command's 1 means that it has looked
        raise CommandFailed(problem.message, USAGE, hint=problem.hint) from problem


def _load(path: Path | None, topology: Path | None) -> Config:
    """The configuration to check. Simulated GPUs alone mean the profile that may have them: dev."""
    from pool_managerd.config.load import load_config

    overrides: Json = {"gpu.simulate": topology.absolute() if topology else None}
    if path is None:
        return load_config(None, env={}, overrides={"profile": "dev", **overrides})
    config = load_config(path, env=os.environ, overrides=overrides)
    if topology is not None and config.profile != "dev":
        hint = "set `profile: dev`, or leave --simulate-gpus out"
        raise CommandFailed(f"cannot simulate GPUs in profile {config.profile}: engines would not get one", USAGE, hint=hint)
    return config


def _lines(report: Json) -> None:
    """One line a finding, however long: what is quoted from here must be whole. Remedies stand below, ready to be copied."""
    findings = report["findings"]
    subjects = max((len(finding["subject"]) for finding in findings), default=0)
    for finding in findings:
        head = (
            f"{_MARKS[finding['level']]:<7}  {finding['subject']:<{min(subjects, 28)}}  {finding['message']}  [{finding['code']}]"
        )
        sys.stdout.write(printable(" ".join(head.split("\n"))) + "\n")
        if finding["level"] != "ok":
            for remedy in finding["remedy"]:
                sys.stdout.write(f"{'':11}{printable(remedy)}\n")
    failed = sum(finding["level"] == "fail" for finding in findings)
    verdict = "ready" if report["ok"] else f"not ready: {failed} of {len(findings)} findings fail"
    sys.stdout.write(f"profile {report['profile']}: {verdict}\n")
