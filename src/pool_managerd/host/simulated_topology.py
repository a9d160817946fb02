"""The grammar of a topology file (docs/reference/simulated-gpus.md), as simulated_topology.c reads it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

MAX_FILE_BYTES = 256 * 1024
_MAX_WORDS, _TEXT, _MAX_LINKS, _MAX_UNITS, _MAX_PROCESSES, _MAX_XIDS = 32, 96, 36, 512, 2048, 256
_SHIFT = {"B": 0, "KiB": 10, "MiB": 20, "GiB": 30}
_SIZE = "a size with a unit, such as 24GiB"


class _WrongError(Exception):
    """What is wrong with a line, as the end of a sentence."""


@dataclass
class _Line:
    name: str
    words: list[str]

    def take(self, key: str) -> str | None:
        for at, word in enumerate(self.words):
            if word.startswith(f"{key}="):
                del self.words[at]
                return word[len(key) + 1 :]
        return None

    def need(self, key: str) -> str:
        value = self.take(key)
        if value is None:
            raise _WrongError(f"{self.name} needs {key}=")
        return value

    def position(self) -> str:
        if not self.words:
            raise _WrongError(f"{self.name} needs a GPU's number")
        return self.words.pop(0)

    def get(self, key: str, default: str) -> str:
        value = self.take(key)
        return default if value is None else value

    def end(self) -> None:
        if self.words:
            raise _WrongError(f"{self.name} knows no {self.words[0]!r} here")

    def number(self, key: str, most: int, default: int | None = None) -> int:
        value = self.take(key)
        if value is None and default is not None:
            return default
        return _number(value or "", most, f"{key}=")

    def text(self, key: str) -> str | None:
        value = self.take(key)
        if value is not None and not 0 < len(value.encode(errors="surrogateescape")) < _TEXT:
            raise _WrongError(f"{key}= must have 1 to {_TEXT - 1} bytes")
        return value

    def choice(self, key: str, *known: str) -> None:
        value = self.take(key)
        if value is not None and value not in known:
            raise _WrongError(f"{key}= must be {' or '.join(known)}")


@dataclass
class _Seen:
    """What earlier lines declared."""

    links: dict[int, int] = field(default_factory=dict)
    uuids: set[str] = field(default_factory=set)
    migs: set[str] = field(default_factory=set)
    processes: int = 0
    xids: int = 0

    def gpu(self, text: str) -> int:
        number = _number(text, 999, "a GPU's number")
        if number not in self.links:
            raise _WrongError(f"there is no gpu {number} above this line")
        return number

    def unit(self, line: _Line) -> None:
        gpu, mig = line.take("gpu"), line.take("mig")
        if (gpu is None) == (mig is None):
            raise _WrongError(f"{line.name} needs either gpu= or mig=")
        if gpu is not None:
            self.gpu(gpu)
        elif mig not in self.migs:
            raise _WrongError(f"there is no mig {mig} above this line")

    def add_uuid(self, uuid: str, prefix: str) -> None:
        if len(self.uuids) == _MAX_UNITS:
            raise _WrongError(f"there are more than {_MAX_UNITS} devices")
        if not re.fullmatch(rf"{prefix}[A-Za-z0-9/-]{{1,75}}", uuid):
            raise _WrongError(f"uuid= must begin with {prefix} and have up to 79 letters, digits, - and /")
        if uuid in self.uuids:
            raise _WrongError(f"{uuid} is there twice")
        self.uuids.add(uuid)

    def add_link(self, number: int) -> None:
        if self.links[number] == _MAX_LINKS:
            raise _WrongError(f"gpu {number} has more than {_MAX_LINKS} links")
        self.links[number] += 1


def first_mistake(text: str) -> tuple[int, str] | None:
    """The number of the first line that is wrong, and why; None when the driver takes the file."""
    seen = _Seen()
    lines = text.split("\n")
    for number, line in enumerate(lines, 1):
        if number == len(lines):
            return (number, "the last line must end, too: it looks half written") if line else None
        try:
            words = _split(line)
            if words:
                read = _DIRECTIVES.get(words[0])
                if read is None:
                    raise _WrongError(f"{words[0][:40]!r} is no directive; there are {', '.join(sorted(_DIRECTIVES))}")
                read(_Line(words[0], words[1:]), seen)
        except _WrongError as why:
            return number, str(why)
    return None


def _split(line: str) -> list[str]:
    words: list[str] = []
    at = 0
    while True:
        while at < len(line) and line[at] in " \t":
            at += 1
        if at == len(line) or line[at] == "#":
            return words
        if len(words) == _MAX_WORDS:
            raise _WrongError(f"a line has at most {_MAX_WORDS} words")
        word, quoted = "", False
        while at < len(line) and (quoted or line[at] not in " \t"):
            if line[at] == '"':
                quoted = not quoted
            else:
                word += line[at]
            at += 1
        if quoted:
            raise _WrongError("a quotation mark is missing")
        words.append(word)


def _number(text: str, most: int, what: str) -> int:
    if not re.fullmatch("[0-9]{1,18}", text) or int(text) > most:
        raise _WrongError(f"{what} must be a whole number up to {most}")
    return int(text)


def _size(text: str, what: str) -> int:
    found = re.fullmatch("([0-9]{1,12})(B|KiB|MiB|GiB)", text)
    if found is None or (size := int(found[1]) << _SHIFT[found[2]]) > 1 << 50:
        raise _WrongError(f"{what} must be {_SIZE}")
    return size


def _two_numbers(text: str, what: str) -> None:
    if not re.fullmatch(r"[0-9]{1,18}\.[0-9]{1,18}", text) or len(text) > 15 or any(int(n) > 99 for n in text.split(".")):
        raise _WrongError(f"{what} must be two numbers, such as 8.6")


def _gpu(line: _Line, seen: _Seen) -> None:
    number = _number(line.position(), 999, "a GPU's number")
    if number in seen.links:
        raise _WrongError(f"gpu {number} is there twice")
    uuid = line.text("uuid")
    seen.add_uuid(f"GPU-00000000-0000-0000-0000-{number:012}" if uuid is None else uuid, "GPU-")
    line.text("name")
    vram = _size(line.need("vram"), "vram=")
    if _size(line.get("reserved", "0B"), "reserved=") > vram:
        raise _WrongError("reserved= must not be more than vram=")
    if not re.fullmatch("[0-9a-fA-F]{4}:[0-9a-fA-F]{2}:[0-9a-fA-F]{2}[.]0", line.get("pci", "0000:00:00.0")):
        raise _WrongError("pci= must look like 0000:01:00.0")
    _two_numbers(line.get("cc", "8.6"), "cc=")
    for key, most in (("numa", 1023), ("temperature", 200), ("power", 9999), ("utilization", 100)):
        line.number(key, most, default=0)
    line.choice("ecc", "on", "off")
    line.choice("persistence", "on", "off")
    line.end()
    seen.links[number] = 0


def _mig(line: _Line, seen: _Seen) -> None:
    seen.gpu(line.position())
    uuid = line.need("uuid")
    seen.add_uuid(uuid, "MIG-")
    _size(line.need("vram"), "vram=")
    line.text("profile")
    line.number("gi", 99, default=0)
    line.number("ci", 99, default=0)
    line.end()
    seen.migs.add(uuid)


def _nvlink(line: _Line, seen: _Seen) -> None:
    if len(line.words) != 2:
        raise _WrongError("nvlink needs two GPUs, or a GPU and the word switch")
    first = seen.gpu(line.words[0])
    ends = [first] if line.words[1] == "switch" else [first, seen.gpu(line.words[1])]
    if ends.count(first) == 2:
        raise _WrongError(f"gpu {first} cannot be linked with itself")
    for end in ends:
        seen.add_link(end)


def _process(line: _Line, seen: _Seen) -> None:
    seen.unit(line)
    line.number("pid", 4_194_304)
    vram = line.need("vram")
    if vram != "unknown":
        _size(vram, "vram=")
    line.choice("kind", "compute", "graphics")
    line.end()
    seen.processes += 1
    if seen.processes > _MAX_PROCESSES:
        raise _WrongError(f"there are more than {_MAX_PROCESSES} processes")


def _xid(line: _Line, seen: _Seen) -> None:
    seen.unit(line)
    line.number("code", 9999)
    line.number("serial", 999_999_999)
    line.end()
    seen.xids += 1
    if seen.xids > _MAX_XIDS:
        raise _WrongError(f"there are more than {_MAX_XIDS} xids")


def _fault(line: _Line, seen: _Seen) -> None:
    if len(line.words) == 2 and line.words[0].startswith("gpu="):
        if line.words[1] == "gone":
            seen.gpu(line.words[0][4:])
            return
        seen.unit(line)
        line.number("error", 999)
        return
    if len(line.words) != 1:
        raise _WrongError("fault needs one of init=, scan=, hang=, abort=, gpu=N error=, gpu=N gone")
    for key in ("hang", "abort"):
        line.choice(key, "init", "scan")
    for key in ("init", "scan"):
        line.number(key, 999, default=0)
    line.end()


def _figure(line: _Line, seen: _Seen) -> None:
    seen.unit(line)
    if line.name == "usage":
        _size(line.need("vram"), "vram=")
    elif line.name == "ecc":
        line.number("uncorrected", 1_000_000_000)
    elif line.name == "recovery":
        line.number("action", 99)
    elif line.name == "memory" and line.need("info") != "unsupported":
        raise _WrongError("info= must be unsupported")
    line.end()


def _node(line: _Line, _seen: _Seen) -> None:
    if len(line.words) != 1:
        raise _WrongError(f"{line.name} needs one word")
    word = line.words[0]
    if line.name == "driver" and not 0 < len(word.encode(errors="surrogateescape")) < 80:
        raise _WrongError("driver must have 1 to 79 bytes")
    if line.name == "cuda":
        _two_numbers(word, "cuda")
    if line.name == "engines":
        vram = line.need("vram")
        if vram != "rss":
            _size(vram, "vram=")
    if line.name == "pids":
        line.need("namespace")
        _Line(line.name, [word]).choice("namespace", "own", "outer")


_DIRECTIVES: dict[str, Callable[[_Line, _Seen], None]] = {
    "gpu": _gpu, "mig": _mig, "nvlink": _nvlink, "process": _process, "xid": _xid, "fault": _fault,
    "usage": _figure, "ecc": _figure, "pending": _figure, "memory": _figure, "recovery": _figure,
    "driver": _node, "cuda": _node, "engines": _node, "pids": _node,
}  # fmt: skip
