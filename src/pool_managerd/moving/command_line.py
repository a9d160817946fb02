"""A command of llama-swap as words, and what kind of program it starts. No shell is involved, as there is none in llama-swap."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal, Protocol

from pool_managerd.moving.macros import without_comments

MAX_COMMAND_CHARS = 65_536
MAX_WORDS = 1_000

Kind = Literal["llamacpp", "vllm", "container", "other"]

_ASSIGNED = re.compile(r"[A-Za-z_][A-Za-z0-9_]*=.*", re.DOTALL)
_CONTAINERS = frozenset({"docker", "podman", "nerdctl"})
_IMAGES = (("text-generation-inference", "tgi"), ("tritonserver", "triton"), ("vllm", "vllm"), ("llama", "llamacpp"))
_STOPS = re.compile(
    r"(?:(?:/usr)?/bin/)?kill(?: -\w+| -s \w+)? \$\{PID\}|\S*(?:docker|podman|nerdctl) (?:stop|kill|rm) .*", re.DOTALL
)


@dataclass(frozen=True, slots=True)
class Written:
    """One flag as the command has it: ``name`` is the engine's one name for it, ``items`` the words. ``refused`` says why the
    daemon does not let a pool have it, or is empty; ``known`` is False for what the engine did not list when it was asked,
    ``beside`` True for a file that must lie beside the model.
    """

    name: str
    values: tuple[str, ...]
    items: tuple[str, ...]
    refused: str = ""
    known: bool = True
    beside: bool = False


class ReadFlags(Protocol):
    """What the words behind a program mean to an engine, and to the daemon that runs it on one GPU, or on several."""

    def __call__(self, engine: str, words: tuple[str, ...], one_gpu: bool) -> tuple[Written, ...]: ...


@dataclass(frozen=True, slots=True)
class Keyed:
    """The flag of llama-server that a key of its presets names: ``name`` and ``negation`` (or nothing) are how it is written,
    ``values`` how many follow. The key ``negates`` it, or is ``mistaken``: the router takes it for its opposite.
    """

    name: str
    negation: str
    values: int
    negates: bool = False
    mistaken: bool = False


class FlagOfKey(Protocol):
    """What a key of presets means to llama-server; None where it is not known."""

    def __call__(self, key: str) -> Keyed | None: ...


@dataclass(frozen=True, slots=True)
class Command:
    """``words`` stand behind the ``program``; ``env`` was set in the command itself; ``engine`` is the nearest that we know."""

    kind: Kind
    engine: str
    program: str
    words: tuple[str, ...]
    env: tuple[str, ...] = ()


def split(text: str) -> list[str]:
    """The words of a command: lines that begin with ``#`` are none, a backslash at the end joins lines. Raises ValueError."""
    if len(text) > MAX_COMMAND_CHARS:
        raise ValueError(f"it is longer than {MAX_COMMAND_CHARS} characters")
    if "\0" in text:
        raise ValueError("it holds NUL")
    lines = without_comments(text).split("\n")
    joined = "\n".join(line.strip().removesuffix("\\") + " " if line.strip().endswith("\\") else line for line in lines)
    try:
        words = shlex.split(joined)
    except ValueError as error:
        raise ValueError("a quote in it is not closed" if "quotation" in str(error) else "it ends with a backslash") from None
    if len(words) > MAX_WORDS:
        raise ValueError(f"it has more than {MAX_WORDS} words")
    return words


def read(text: str) -> Command | None:
    """The command in ``text``; None where there is none. Raises ValueError."""
    words = split(text)
    env: list[str] = []
    if words and PurePosixPath(words[0]).name == "env":
        words = words[1:]
        while words and _ASSIGNED.fullmatch(words[0]):
            env.append(words.pop(0))
    if not words or not words[0]:
        return None
    program, rest = words[0], tuple(words[1:])
    name = PurePosixPath(program).name.lower()
    if "llama-server" in name:
        return Command("llamacpp", "llamacpp", program, rest, tuple(env))
    if name == "vllm" and rest[:1] == ("serve",):
        return Command("vllm", "vllm", program, rest[1:], tuple(env))
    kind: Kind = "container" if name in _CONTAINERS and "run" in rest[:2] else "other"
    return Command(kind, _nearest(rest if kind == "container" else (program, *rest)), program, rest, tuple(env))


def _nearest(words: tuple[str, ...]) -> str:
    """The engine that a container or a script most probably runs."""
    text = " ".join(words).lower()
    return next((engine for sign, engine in _IMAGES if sign in text), "llamacpp")


def only_stops(text: str) -> bool:
    """Whether a ``cmdStop`` does no more than to end what was started."""
    return _STOPS.fullmatch(" ".join(text.split())) is not None
