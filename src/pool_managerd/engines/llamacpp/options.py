"""What options a llama-server binary has, read from its own ``--help``, and what version it is, from ``--version``.

The answers are kept per file as long as it is unchanged, so a restart asks nothing.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pool_managerd.engines.flags import Option, OptionTable, recorded
from pool_managerd.engines.llamacpp.rules import LISTS
from pool_managerd.engines.llamacpp.server import OPTIONS, missing_library
from pool_managerd.engines.programs import ProgramProbe

ALIASES = {
    "--ngl": "--n-gpu-layers",
    "-ngl": "--n-gpu-layers",
    "--gpu-layers": "--n-gpu-layers",
    "-c": "--ctx-size",
    "--ctx": "--ctx-size",
    "--context": "--ctx-size",
    "--context-size": "--ctx-size",
    "--no-ui": "--no-webui",
    "--no-webui": "--no-ui",
}
"""Names people write that a given llama-server may not know, and what they mean (SPEC §6.6, §20 no. 36)."""

_VARIABLES = {
    "HF_TOKEN": "--hf-token",
    "LLAMA_API_KEY": "--api-key",
    "LLAMA_ARG_BATCH": "--batch-size",
    "LLAMA_ARG_CHECKPOINT_MIN_SPACING_NT": "--checkpoint-min-step",
    "LLAMA_ARG_DIO": "--direct-io",
    "LLAMA_ARG_ENDPOINT_METRICS": "--metrics",
    "LLAMA_ARG_ENDPOINT_PROPS": "--props",
    "LLAMA_ARG_ENDPOINT_SLOTS": "--slots",
    "LLAMA_ARG_N_PARALLEL": "--parallel",
    "LLAMA_ARG_ROPE_SCALING_TYPE": "--rope-scaling",
    "LLAMA_ARG_SPEC_DRAFT_CACHE_TYPE_K": "--spec-draft-type-k",
    "LLAMA_ARG_SPEC_DRAFT_CACHE_TYPE_V": "--spec-draft-type-v",
    "LLAMA_ARG_SPEC_DRAFT_HF_REPO": "--spec-draft-hf",
    "LLAMA_ARG_STATIC_PATH": "--path",
    "LLAMA_ARG_THINK": "--reasoning-format",
    "LLAMA_ARG_THINK_BUDGET": "--reasoning-budget",
    "LLAMA_ARG_THINK_BUDGET_MESSAGE": "--reasoning-budget-message",
    "LLAMA_ARG_UBATCH": "--ubatch-size",
}
"""Variables of the environment that are not called as their flags are."""

RECORDED = "llama_server_options.json"
MIN_OPTIONS = 20
MAX_LINE_CHARS = 2_000

_NAME = re.compile(r"(-{1,2}[A-Za-z][\w.-]*)(,?)")
_BRACKETED = re.compile(r"<[^>]*>|\[[^\]]*\]|\{[^}]*\}")
_VERSION = re.compile(r"version:\s*(\d+)\s*\(([0-9a-fA-F]{6,40})\)")
_DESCRIPTION_COLUMN = 40


@dataclass(frozen=True, slots=True)
class BinaryFacts:
    """What a llama-server binary said about itself. ``warnings`` say what it would not say, ``missing`` which library it
    cannot be loaded without, and what gets it.
    """

    options: OptionTable
    version: str
    warnings: tuple[str, ...] = ()
    missing: tuple[str, str] | None = None


def parse_help(text: str) -> tuple[Option, ...]:
    """The options of a llama.cpp help text; removed ones are left out."""
    options = []
    for line in (whole[:MAX_LINE_CHARS] for whole in text.splitlines()):
        if line.startswith("-") and not line.startswith("---") and "the argument has been removed" not in line:
            option = _parse_line(line)
            if option is not None:
                options.append(option)
    return tuple(options)


def _parse_line(line: str) -> Option | None:
    names: list[str] = []
    position = 0
    while found := _NAME.match(line, position):
        names.append(found[1])
        position = found.end()
        if not found[2]:
            break
        while position < len(line) and line[position] == " ":
            position += 1
    if not names:
        return None
    return _option(names, _count_values(line, position))


def _count_values(line: str, position: int) -> int:
    """How many values the hint after the names asks for: ``N`` one, ``START END`` two, nothing none."""
    rest = line[position:]
    if not rest.startswith(" ") or rest.startswith("  "):
        return 0
    described = position < _DESCRIPTION_COLUMN < len(line) and line[_DESCRIPTION_COLUMN - 1] == " "
    hint = line[position:_DESCRIPTION_COLUMN] if described else re.split(r" {2,}", rest.strip())[0]
    return len(_BRACKETED.sub("X", hint).split())


def _option(names: Sequence[str], values: int) -> Option:
    """Sort names into the option and its negation: ``--no-x`` beside ``--x``, and a short name after the last ``--x``."""
    positive_long = [name for name in names if name.startswith("--") and not name.startswith("--no-")]
    if not positive_long:
        return Option(tuple(names), (), values)
    last = max(names.index(name) for name in positive_long)
    negated = [
        name
        for index, name in enumerate(names)
        if name.startswith("--no-") or (index > last and not name.startswith("--") and values == 0)
    ]
    return Option(tuple(name for name in names if name not in negated), tuple(negated), values)


def recorded_options() -> OptionTable:
    """The options of llama-server b10068 as recorded in this package: what is known when a binary does not say."""
    return OptionTable(recorded(RECORDED)[0], ALIASES, lists=LISTS)


def flag_of_variable(name: str) -> str:
    """The flag that llama-server takes from a variable of its environment; empty for one of another kind."""
    if name in _VARIABLES or not name.startswith("LLAMA_ARG_"):
        return _VARIABLES.get(name, "")
    return "--" + name.removeprefix("LLAMA_ARG_").lower().replace("_", "-")


def launcher_options() -> OptionTable:
    """The flags that the embedded engine's launcher takes, with llama-server's own other names for them."""
    own = [Option(option.names, option.negated, option.values) for option in OPTIONS]
    return OptionTable(own, ALIASES, lists=LISTS, elsewhere=recorded_options())


class ServerBinaries:
    """What llama-server binaries said about themselves. One that is not run is taken for the recorded one."""

    def __init__(self, probe: ProgramProbe) -> None:
        self._probe = probe
        self._known: dict[tuple[str | int, ...], BinaryFacts] = {}

    def facts(self, path: Path, library_path: str = "") -> BinaryFacts:
        """Options and version of ``path``. Blocks up to 20 s; run it in a thread. A silent binary costs warnings only.

        ``library_path`` is the LD_LIBRARY_PATH that the engine will have, if any.
        """
        info = path.stat()
        # Whoever replaces a file can set its mtime, but not its ctime.
        key = (str(path), library_path, info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns)
        if key not in self._known:
            if len(self._known) >= 64:
                self._known.clear()
            found = self._ask(path, library_path)
            if found.missing is not None:
                return found  # it may be installed at any time
            self._known[key] = found
        return self._known[key]

    def _ask(self, path: Path, library_path: str) -> BinaryFacts:
        warnings: list[str] = []
        help_text, problem = self._probe.ask(str(path), "--help", library_path=library_path)
        missing = missing_library(help_text) if problem else None
        options = parse_help(help_text)
        if len(options) >= MIN_OPTIONS:
            table = OptionTable(options, ALIASES, lists=LISTS)
        else:
            table = recorded_options()
            warnings.append(f"{path.name} --help {problem or 'lists no options'}; flags are checked against llama-server b10068")
        version_text, problem = self._probe.ask(str(path), "--version", library_path=library_path)
        found = _VERSION.search(version_text)
        if found is None:
            warnings.append(f"{path.name} --version {problem or 'names no version'}; engine_version is unknown")
        version = f"llamacpp-b{found[1]}-{found[2]}" if found else "unknown"
        return BinaryFacts(table, version, tuple(warnings), missing)
