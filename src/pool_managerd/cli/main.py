"""``pool-managerd``: the command tree. Heavy imports happen inside the commands, so that ``--help`` is quick."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Callable

import typer

from pool_managerd.cli import changes, devices, explain, follow, output, preflight, reads, serving
from pool_managerd.cli.exits import NO, CommandFailed

app = typer.Typer(
    name="pool-managerd",
    help="Supervised inference engines on this machine.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
config_app = typer.Typer(help="Check the configuration, or print its schema.", rich_markup_mode=None, no_args_is_help=True)
breaker_app = typer.Typer(help="The circuit breaker of a pool.", rich_markup_mode=None, no_args_is_help=True)
devices_app = typer.Typer(rich_markup_mode=None, invoke_without_command=True, callback=devices.devices)

_COMMANDS: tuple[Callable[..., None], ...] = (
    *(serving.serve, serving.demo, reads.pools, reads.status, changes.start, changes.stop, changes.preload),
    *(changes.drain, changes.undrain, changes.restart, changes.hold, changes.release, reads.command),
    *(reads.leases, follow.logs, follow.events, reads.crashes, explain.explain, preflight.preflight),
    *(serving.version,),
)
for _command in _COMMANDS:
    app.command()(_command)
breaker_app.command("reset")(changes.breaker_reset)
config_app.command("check")(serving.config_check)
config_app.command("schema")(serving.config_schema)
for _command in (devices.cordon, devices.uncordon, devices.release, devices.resume):
    devices_app.command()(_command)
app.add_typer(devices_app, name="devices")
app.add_typer(breaker_app, name="breaker")
app.add_typer(config_app, name="config")


@app.callback()
def _root() -> None:
    """Supervised inference engines on this machine."""


def _open_missing_streams() -> None:
    """Whoever started us closed stdin, stdout or stderr: without this the next file or socket would get its number."""
    for fd, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(fd)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest free number: this one
            setattr(sys, name, open(fd, mode, closefd=False))  # noqa: SIM115 - for the life of the process


def run() -> None:
    """The console script. Exit codes: 0 ok, 1 the answer is no, 2 usage or config, 3 unreachable, 4 refused by the daemon."""
    _open_missing_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that cannot show a sign shows a question mark
    try:
        try:
            app()
        finally:
            sys.stdout.flush()
    except CommandFailed as failure:
        output.error(failure.message, failure.hint)
        sys.exit(failure.exit_code)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        output.error(f"cannot write the answer: {error.strerror}")
        os._exit(NO)  # without another attempt to write it
