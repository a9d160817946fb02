"""Commands that run or check the daemon itself."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pool_managerd._version import __version__
from pool_managerd.cli.client import DEFAULT_CONFIG
from pool_managerd.cli.exits import NO, USAGE, CommandFailed
from pool_managerd.cli.options import ConfigFile, Output
from pool_managerd.cli.output import Format, error, printable, show
from pool_managerd.cli.table import facts
from pool_managerd.errors import SpecError

if TYPE_CHECKING:
    from pool_managerd.config import Config

Bind = Annotated[
    str | None, typer.Option("--bind", metavar="HOST:PORT", help="Where the control API listens.", show_default=False)
]
RuntimeDir = Annotated[
    Path | None, typer.Option("--runtime-dir", help="Pid files, handoff files, engine logs.", show_default=False)
]
StateDir = Annotated[Path | None, typer.Option("--state-dir", help="What survives a restart.", show_default=False)]
SimulateGpus = Annotated[
    Path | None,
    typer.Option(
        "--simulate-gpus", metavar="FILE", help="Simulate the GPUs of this topology file; profile dev only.", show_default=False
    ),
]
Watch = Annotated[bool, typer.Option("--watch", help="Apply the configuration file whenever it changes.")]
Deep = Annotated[bool, typer.Option("--deep", help="Look at models, engines and flags of every pool as well.")]
Model = Annotated[
    Path | None, typer.Option("--model", metavar="FILE.gguf", help="This model instead of the bundled one.", show_default=False)
]
RunRef = Annotated[
    str, typer.Argument(metavar="REF", help="A file, hf:ORG/REPO/FILE, hf:ORG/REPO:QUANTISATION, hf:ORG/REPO or https://…")
]
RunMessage = Annotated[str | None, typer.Option("--message", "-m", help="Ask it this, and end.", show_default=False)]
RunCtx = Annotated[
    int | None, typer.Option("--ctx", min=1, help="Tokens of context over all slots; absent: what fits.", show_default=False)
]
RunSlots = Annotated[int, typer.Option("--slots", min=1, help="Requests that it serves at the same time.")]
RunDevices = Annotated[str | None, typer.Option("--devices", help="GPUs it may use, such as 0,1.", show_default=False)]
RunId = Annotated[str | None, typer.Option("--id", help="Its name; absent: made of REF.", show_default=False)]
RunBind = Annotated[
    str | None,
    typer.Option(
        "--bind",
        metavar="HOST:PORT",
        help="Where it is asked; absent: 127.0.0.1:8088, or any port where that is taken.",
        show_default=False,
    ),
]
RunDry = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and what it needs; nothing is.")]
CheckedFile = Annotated[
    Path | None, typer.Argument(metavar="[FILE]", help="Configuration file: YAML or TOML.", show_default=False)
]


def serve(
    config: ConfigFile = None,
    bind: Bind = None,
    runtime_dir: RuntimeDir = None,
    state_dir: StateDir = None,
    simulate_gpus: SimulateGpus = None,
    watch: Watch = False,
) -> None:
    """Run the daemon until SIGTERM or Ctrl-C.

    A second signal does not wait for engines to end. SIGHUP applies the configuration file as it is then, as `apply` does.
    """
    overrides = {"daemon.bind": bind, "daemon.runtime_dir": runtime_dir, "daemon.state_dir": state_dir}
    if simulate_gpus is not None:
        overrides["gpu.simulate"] = simulate_gpus.absolute()
    from pool_managerd.daemon.init import become_init

    become_init()
    path = _config_path(config)
    from pool_managerd.config.source import ConfigSource

    source = ConfigSource(path, os.environ, overrides)
    text = source.text()
    loaded = source.load(text)
    import asyncio

    from pool_managerd import daemon

    raise typer.Exit(asyncio.run(daemon.serve(loaded, os.environ, daemon.Origin(source, text, watch))))


def demo(model: Model = None) -> None:
    """Run a small model under supervision and ask it something."""
    from pool_managerd.cli.demo import run_demo

    raise typer.Exit(run_demo(model))


def run(
    ref: RunRef, message: RunMessage = None, ctx: RunCtx = None, slots: RunSlots = 1, devices: RunDevices = None,
    pool_id: RunId = None, bind: RunBind = None, dry_run: RunDry = False, config: ConfigFile = None,
) -> None:  # fmt: skip
    """Run one model until Ctrl-C, with nothing to configure.

    It is fetched if need be, and runs on the GPUs and with the context that it fits. What is fetched, what it needs and what was
    chosen is said first. It is a node of its own, beside a daemon that may run; of a
    configuration file it takes all but the pools. What a Ctrl-C has left of a download is gone on with the next time.
    """
    from pool_managerd.cli.running import Wishes, run_model

    wishes = Wishes(ref, pool_id, ctx, slots, devices, message, bind, dry_run)
    raise typer.Exit(run_model(wishes, config or (DEFAULT_CONFIG if DEFAULT_CONFIG.is_file() else None)))


def config_check(file: CheckedFile = None, config: ConfigFile = None, deep: Deep = False, output: Output = Format.TABLE) -> None:
    """Check a configuration file.

    The environment is applied. Exits 1 when the file cannot be used, 2 when there is none. Model files that are missing are
    warned of; with --deep they are errors, as is all else for which a start would be refused.
    """
    path = _config_path(file or config)
    _require_file(path)
    answer: dict[str, Any] = {"ok": True, "file": str(path)}
    failure: CommandFailed | None = None
    try:
        loaded = _load(path, {})
        from pool_managerd import daemon

        daemon.check(loaded, os.environ)
        answer |= {"profile": loaded.profile, "bind": loaded.daemon.bind, "pools": [pool.id for pool in loaded.pools]}
        failure = _look_at_pools(loaded, deep, answer)
    except SpecError as problem:
        from pool_managerd.config.load import CHECKS_A_FILE

        failure = CommandFailed(problem.message, NO, hint=problem.hint and problem.hint.removesuffix(CHECKS_A_FILE))
    if failure is not None:
        answer |= {"ok": False, "error": failure.message, "hint": failure.hint}
    if failure is None or output is Format.JSON:
        told = ("problems", "warnings") if output is not Format.JSON else ()
        shown = {key: value for key, value in answer.items() if key not in told}
        show(shown, output, lambda found: facts((key, ", ".join(v) if isinstance(v, list) else v) for key, v in found.items()))
    if failure is not None:
        raise failure


def _look_at_pools(loaded: Config, deep: bool, answer: dict[str, Any]) -> CommandFailed | None:
    """What pools need on this machine: with ``deep`` all of it, a failure when something is wrong; else files, as warnings.

    Ports that several pools have, or the daemon itself, are warned of in any case: no start fails for them.
    """
    from pool_managerd.core.preflight import daemon_port, shared_ports
    from pool_managerd.wiring.preflight import wants_of
    from pool_managerd.wiring.setups import setups_of

    wants = wants_of(loaded)
    if ports := [*shared_ports(wants), *daemon_port(wants)]:
        answer["warnings"] = [{"code": f.code, "message": f.message, "remedy": list(f.remedy)} for f in ports]
        for found in ports:
            sys.stderr.write(printable(f"warning: {found.message} (such as {'; '.join(found.remedy)})") + "\n")
    problems = setups_of(loaded, engines=deep, tell=error).problems()
    if not problems:
        return None
    answer["problems"] = [{"pool": pool, "message": message, "hint": hint or None} for pool, message, hint in problems]
    lines = [f"pool {pool}: {message}" + (f" ({hint})" if hint else "") for pool, message, hint in problems]
    if deep:
        return CommandFailed("\n".join(lines), NO)
    for line in lines:
        sys.stderr.write(printable(f"warning: {line}") + "\n")
    sys.stderr.write("config check --deep looks at models, engines and flags of every pool\n")
    return None


def config_show(file: CheckedFile = None, config: ConfigFile = None, output: Output = Format.TABLE) -> None:
    """Show the configuration in effect, secrets masked.

    That is the file with the environment applied and every default filled in, as YAML or with -o json.
    """
    path = file or config or (DEFAULT_CONFIG if DEFAULT_CONFIG.is_file() else None)
    if path is not None:
        _require_file(path)

    show(_effective(_load(path, {})), output, _write_yaml)


def _effective(config: Config) -> dict[str, Any]:
    """Every key with the value that holds. What is secret in environments, flags and URLs is masked."""
    from pool_managerd.core.redaction import masked_argv, masked_env, masked_text

    def masked(value: Any) -> Any:
        if isinstance(value, str):
            return masked_text(value)
        if isinstance(value, list):
            return [masked(item) for item in value]
        return {key: masked(item) for key, item in value.items()} if isinstance(value, dict) else value

    found: dict[str, Any] = config.model_dump(mode="json", exclude={"base_dir"})
    for pool in found["pools"]:
        provisioning = pool["provisioning"]
        provisioning["env"] = masked_env(provisioning.get("env") or {})
        provisioning["flags"] = masked_argv(provisioning.get("flags") or [])
    return {key: masked(item) for key, item in found.items()}


def _write_yaml(found: dict[str, Any]) -> None:
    """As YAML that can be read back."""
    from ruamel.yaml import YAML

    writer = YAML(typ="safe", pure=True)
    writer.default_flow_style = False
    writer.sort_base_mapping_type_on_output = False  # type: ignore[assignment]  # in the order of the reference
    writer.width = 4096
    writer.dump(found, sys.stdout)


def config_schema() -> None:
    """Print the JSON Schema of the configuration file."""
    from pool_managerd.config.load import config_schema_text

    sys.stdout.write(config_schema_text())


def version(output: Output = Format.TABLE) -> None:
    """Print the version."""
    show({"version": __version__}, output, lambda found: print(found["version"]))


def _require_file(path: Path) -> None:
    if not path.is_file():
        why = "it is a directory" if path.is_dir() else "it is no regular file" if path.exists() else "no such file"
        raise CommandFailed(f"cannot read {path}: {why}", USAGE)


def _config_path(given: Path | None) -> Path:
    if given is not None:
        return given
    if DEFAULT_CONFIG.is_file():
        return DEFAULT_CONFIG
    raise CommandFailed(
        f"cannot find a configuration: no --config was given and there is no ./{DEFAULT_CONFIG}",
        USAGE,
        hint="give one with --config FILE, or try: pool-managerd demo",
    )


def _load(path: Path | None, overrides: dict[str, Any]) -> Config:
    from pool_managerd.config.load import load_config

    return load_config(path, env=os.environ, overrides=overrides)
