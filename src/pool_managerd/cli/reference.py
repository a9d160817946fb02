"""The reference page of the command line, made from the command tree itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import typer

from pool_managerd.cli.main import app

_INTRO = """# Command line

`pool-managerd COMMAND --help` shows the same. Commands that talk to a daemon find it by `--url`, `POOL_MANAGERD_URL`, the
`bind` of `--config` or of `./pool-managerd.yaml`, else `http://127.0.0.1:9200`; the token comes from the file named by
`POOL_MANAGERD_TOKEN_FILE`, or from `AUTH_TOKEN`. Every read takes `-o json`. On a terminal tables are as wide as it is: what
is cut has a `…`, and columns that matter less are left out; `-o wide` shows all of it, and so does a pipe. `NO_COLOR` is
respected.

Exit codes: 0 ok, also when it was so already; 1 the answer is no (a pool is not ready, the operation failed, a check found
something, the wait was too long); 2 usage or configuration; 3 the daemon cannot be reached; 4 the daemon refused; 130 after
Ctrl-C; 141 when nobody reads the output any more. A change of several pools goes on with the others when one fails, and exits
with the highest of the codes.

Completion of commands, pool ids, devices and operations: `pool-managerd --install-completion` (bash, zsh, fish).
"""


def markdown() -> str:
    """The page. The same commands always give the same text."""
    lines = [_INTRO]
    for path, command in _commands((), typer.main.get_command(app)):
        arguments = [p for p in command.params if p.param_type_name == "argument"]
        options = [
            p
            for p in command.params
            if p.param_type_name == "option" and p.name not in ("help", "install_completion", "show_completion")
        ]
        usage = " ".join(["pool-managerd", *path, *(str(p.metavar or p.name.upper()) for p in arguments)])
        lines += [f"## `{usage}`", "", " ".join((command.help or "").split()), ""]
        if options:
            lines += ["| Option | Meaning |", "|---|---|"]
            lines += [f"| {', '.join(f'`{o}`' for o in p.opts)} | {p.help or ''} |" for p in options]
            lines.append("")
    return "\n".join(lines)


def _commands(path: tuple[str, ...], command: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    children = getattr(command, "commands", None)
    if children is None or command.invoke_without_command:
        yield path, command
    if children is None:
        return
    for name, child in children.items():
        if child.hidden:  # another name of a command that is described
            continue
        yield from _commands((*path, name), child)
