"""The header of a GGUF file: its metadata and its list of tensors, as data; no tensor is read.

Files come from anywhere, so every count, length, name and offset is checked before anything is made of it. Long arrays
(a tokenizer's vocabulary) are passed over; only their length is kept.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

from pool_managerd.core.memory.tensor_types import GGML_TYPES
from pool_managerd.models.byte_reader import ByteReader, FileSource, Refuse, Source
from pool_managerd.models.gguf import gguf_file, refused, version_in

MAX_HEADER_BYTES = 512 << 20
MAX_KEYS = 4_096
MAX_TENSORS = 131_072
MAX_ARRAY = 4_194_304
MAX_ITEMS = 4_194_304
MAX_KEPT = 4_096
MAX_NAME_BYTES = 1_024
MAX_TEXT_BYTES = 16 << 20
MAX_DIMS = 4
MAX_ALIGNMENT = 1 << 20
MAX_TENSOR_BYTES = 1 << 50

_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")
_NUMBERS = {
    0: struct.Struct("<B"), 1: struct.Struct("<b"), 2: struct.Struct("<H"), 3: struct.Struct("<h"), 4: _U32,
    5: struct.Struct("<i"), 6: struct.Struct("<f"), 7: struct.Struct("<?"), 10: _U64, 11: struct.Struct("<q"),
    12: struct.Struct("<d"),
}  # fmt: skip
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True, slots=True)
class ArrayValue:
    """An array of ``length`` items; ``items`` are kept of short arrays of numbers alone."""

    length: int
    items: tuple[int | float | bool, ...] | None = None


Value = int | float | bool | str | ArrayValue


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor's place: ``size_bytes`` at ``offset`` of the tensor data. ``type_name`` is empty for an unknown type."""

    name: str
    dims: tuple[int, ...]
    type_name: str
    offset: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """What one file says of itself. Texts longer than a few thousand bytes are left out of ``values``."""

    values: dict[str, Value]
    tensors: tuple[TensorInfo, ...]


def read_gguf_header(path: str) -> GgufHeader:
    """Read and check one file. Blocking: a few small reads, tens of milliseconds for a long vocabulary.

    Raises SpecError for what is no GGUF model, is damaged, or whose tensors go beyond the end of the file: an
    incomplete download.
    """
    with gguf_file(path) as fd:
        return parse_gguf_header(path, FileSource(fd))


def parse_gguf_header(name: str, source: Source) -> GgufHeader:
    """The same of ``source``, which errors call ``name``."""
    refuse = partial(refused, name)
    reader = ByteReader(source, MAX_HEADER_BYTES, refuse)
    if reader.size < 24:
        version_in(name, source.read(0, min(8, reader.size), 8))
    version_in(name, reader.take(8))
    return _Parser(reader, refuse).header()


class _Parser:
    def __init__(self, reader: ByteReader, refuse: Refuse) -> None:
        self._reader, self._refuse = reader, refuse
        self._items = 0

    def header(self) -> GgufHeader:
        n_tensors = self._count("tensors", MAX_TENSORS)
        n_keys = self._count("metadata keys", MAX_KEYS)
        values: dict[str, Value] = {}
        for _ in range(n_keys):
            key = self._name()
            if key in values:
                raise self._refuse(f"its metadata key {key[:80]!r} appears twice")
            values[key] = self._value()
        raw = [self._tensor() for _ in range(n_tensors)]
        if len({name for name, *_ in raw}) != len(raw):
            raise self._refuse("a tensor's name appears twice")
        alignment = self._alignment(values)
        start = -(-self._reader.position // alignment) * alignment
        data_bytes = max(0, self._reader.size - start)
        tensors = tuple(self._sized(raw, data_bytes))
        needed = max((t.offset + t.size_bytes for t in tensors), default=0)
        if needed > data_bytes:
            raise self._refuse(
                f"it has {self._reader.size} bytes of the {start + needed} that its tensors need: the download is not complete"
            )
        if sum(t.size_bytes for t in tensors) > data_bytes:
            raise self._refuse("its tensors overlap")
        return GgufHeader(values, tensors)

    def _value(self) -> Value:
        """One metadata value; nothing of a text that is too long to be a fact."""
        kind = self._reader.unpack(_U32)
        if kind == _STRING:
            length = self._length(MAX_TEXT_BYTES)
            if length > MAX_KEPT:
                self._reader.skip(length)
                return ArrayValue(0)
            return self._reader.take(length).decode("utf-8", "replace")
        if kind == _ARRAY:
            return self._array()
        return self._reader.unpack(self._number(kind))

    def _array(self) -> ArrayValue:
        kind = self._reader.unpack(_U32)
        length = self._count("items of an array", MAX_ARRAY)
        self._items += length
        if self._items > MAX_ITEMS:
            raise self._refuse(f"its arrays have more than {MAX_ITEMS} items")
        if kind == _ARRAY:
            raise self._refuse("an array lies within an array")
        if kind == _STRING:
            self._reader.skip_strings(length, _U64)
            return ArrayValue(length)
        form = self._number(kind)
        if length > MAX_KEPT:
            self._reader.skip(length * form.size)
            return ArrayValue(length)
        raw = self._reader.take(length * form.size)
        return ArrayValue(length, tuple(item[0] for item in form.iter_unpack(raw)))

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._name()
        n_dims = self._reader.unpack(_U32)
        if n_dims > MAX_DIMS:
            raise self._refuse(f"the tensor {name[:80]!r} has {n_dims} dimensions, more than {MAX_DIMS}")
        dims = tuple(self._reader.unpack(_U64) for _ in range(n_dims))
        return name, dims, self._reader.unpack(_U32), self._reader.unpack(_U64)

    def _sized(self, raw: list[tuple[str, tuple[int, ...], int, int]], data_bytes: int) -> Iterable[TensorInfo]:
        """Each tensor with its size; one of a type that is newer than this table reaches to the next one."""
        starts = sorted({offset for *_, offset in raw})
        following = dict(zip(starts, [*starts[1:], data_bytes], strict=False))
        for name, dims, kind, offset in raw:
            values = 1
            for dim in dims:
                values *= dim
                if not 0 < dim <= MAX_TENSOR_BYTES or values > MAX_TENSOR_BYTES:
                    raise self._refuse(f"the tensor {name[:80]!r} has impossible dimensions")
            type_name, block, block_bytes = GGML_TYPES.get(kind, ("", 0, 0))
            if block and dims and dims[0] % block:
                raise self._refuse(f"the tensor {name[:80]!r} has rows of {dims[0]}, no multiple of its type's {block}")
            size = values // block * block_bytes if block else following[offset] - offset
            yield TensorInfo(name, dims, type_name, offset, max(0, size))

    def _alignment(self, values: dict[str, Value]) -> int:
        found = values.get("general.alignment", 32)
        if not isinstance(found, int) or not 0 < found <= MAX_ALIGNMENT or found & (found - 1):
            raise self._refuse("its alignment is no power of two")
        return found

    def _name(self) -> str:
        return self._reader.take(self._length(MAX_NAME_BYTES)).decode("utf-8", "replace")

    def _length(self, limit: int) -> int:
        length = self._reader.unpack(_U64)
        if length > limit:
            raise self._refuse(f"a text in it is {length} bytes long, more than {limit}")
        return length

    def _count(self, what: str, limit: int) -> int:
        count = self._reader.unpack(_U64)
        if count > limit:
            raise self._refuse(f"it claims {count} {what}, more than {limit}")
        return count

    def _number(self, kind: int) -> struct.Struct:
        form = _NUMBERS.get(kind)
        if form is None:
            raise self._refuse(f"a metadata value has the unknown type {kind}")
        return form
