"""``pool-managerd``: the command tree. Heavy imports happen inside the commands, so that ``--help`` is quick."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from pool_managerd._version import __version__
from pool_managerd.cli import apply as applying
from pool_managerd.cli import (
    bench,
    changes,
    chat,
    crashes,
    devices,
    explain,
    follow,
    gateway,
    model_keeping,
    models,
    moving,
    output,
    preflight,
    queue,
    reads,
    requests,
    serving,
    streams,
    waiting,
    yielding,
)
from pool_managerd.cli import purge as purging
from pool_managerd.cli import reload as reloading
from pool_managerd.cli.exits import NO, USAGE, CommandFailed
from pool_managerd.cli.top import top
from pool_managerd.errors import PoolError, SpecError

_HELP = "Supervised inference engines on this machine."


class _Commands(TyperGroup):
    """What is wrong with a value is said without the words of the library that checks it."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except typer.BadParameter as wrong:
            wrong.message = wrong.message.removeprefix("Value error, ")
            raise


app = typer.Typer(
    cls=_Commands,
    name="pool-managerd",
    help=_HELP,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
config_app = typer.Typer(
    help="Check, show, describe the configuration; bring one back.", rich_markup_mode=None, no_args_is_help=True
)
breaker_app = typer.Typer(help="The circuit breaker of a pool.", rich_markup_mode=None, no_args_is_help=True)
devices_app = typer.Typer(rich_markup_mode=None, invoke_without_command=True, callback=devices.devices)

_COMMANDS: tuple[Callable[..., None], ...] = (
    *(serving.serve, serving.demo, reads.pools, reads.status, changes.start, changes.stop, changes.evict, changes.restart),
    *(
        changes.preload,
        reloading.reload,
        applying.apply,
        bench.bench,
        purging.purge,
        changes.drain,
        changes.undrain,
        changes.hold,
        changes.release,
        changes.rm,
        waiting.wait,
        reads.operations,
    ),
    *(
        reads.command,
        reads.leases,
        queue.queue,
        top,
        follow.logs,
        follow.events,
        crashes.crashes,
        explain.explain,
        preflight.preflight,
    ),
    *(serving.run, gateway.gateway, chat.chat, requests.requests, requests.cancel, serving.version),
)
for _command in _COMMANDS:
    app.command()(_command)
app.command("yield")(yielding.yield_)
for _alias in ("ps", "ls"):
    app.command(_alias, hidden=True)(reads.pools)
app.command(hidden=True)(gateway.gateway_worker)
breaker_app.command("reset")(changes.breaker_reset)
config_app.command("check")(serving.config_check)
config_app.command("show")(serving.config_show)
config_app.command("schema")(serving.config_schema)
config_app.command("history")(applying.history)
config_app.command("rollback")(applying.rollback)
for _command in (devices.cordon, devices.uncordon, devices.release, devices.resume):
    devices_app.command()(_command)
keys_app = typer.Typer(help="API keys of the gateway.", rich_markup_mode=None, no_args_is_help=True)
for _name, _command in (("add", gateway.keys_add), ("ls", gateway.keys_ls), ("rm", gateway.keys_rm)):
    keys_app.command(_name)(_command)
models_app = typer.Typer(help="Models that were fetched.", rich_markup_mode=None, no_args_is_help=True)
for _command in (models.ls, models.pull, models.cancel, models.verify, models.rm):
    models_app.command()(_command)
for _command in (model_keeping.pin, model_keeping.unpin, model_keeping.gc):
    models_app.command()(_command)
models_app.command("import")(models.import_)
import_app = typer.Typer(help="Move over from another tool.", rich_markup_mode=None, no_args_is_help=True)
import_app.command("llama-swap")(moving.import_llama_swap)
import_app.command("llama-cpp-presets")(moving.import_presets)
app.add_typer(import_app, name="import")
app.add_typer(models_app, name="models")
app.add_typer(keys_app, name="keys")
app.add_typer(devices_app, name="devices")
app.add_typer(breaker_app, name="breaker")
app.add_typer(config_app, name="config")


def _print_version(asked: bool) -> None:
    if asked:
        sys.stdout.write(__version__ + "\n")
        raise typer.Exit


Version = Annotated[bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)]


@app.callback(help=_HELP)
def _root(version: Version = False) -> None:
    del version


def run() -> None:
    """The console script.

    Exit codes: 0 ok, 1 the answer is no, 2 usage or config, 3 unreachable, 4 refused by the daemon, 130 after Ctrl-C, 141 when
    nobody reads the output any more.
    """
    streams.prepare()
    code = 0
    try:
        try:
            app()
        except (CommandFailed, PoolError) as failure:
            code = failure.exit_code if isinstance(failure, CommandFailed) else USAGE if isinstance(failure, SpecError) else NO
            output.error(failure.message, failure.hint)
            sys.exit(code)
        finally:
            sys.stdout.flush()
    except streams.OutputLostError as lost:
        if code:  # the error could not be told: it is one all the same
            os._exit(code)
        streams.give_up(lost)
