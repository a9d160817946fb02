"""Shapes of models on disk, whatever kind of file they are; each is read once as long as it is the same file."""

from __future__ import annotations

from pathlib import Path

from pool_managerd.core.memory.model_shape import ModelShape
from pool_managerd.models.byte_reader import identity
from pool_managerd.models.gguf import check_gguf, is_gguf
from pool_managerd.models.gguf_parts import model_parts, parts_beside

MAX_SHAPES = 256


class Shapes:
    """A bounded cache of headers, by what file it is. Blocking; used from threads."""

    def __init__(self) -> None:
        self._known: dict[tuple[object, ...], ModelShape | None] = {}
        self._expected: dict[str, ModelShape] = {}

    def expect(self, path: str, shape: ModelShape) -> None:
        """The shape of the model that will be at ``path``: it counts as long as there is none."""
        if len(self._expected) >= MAX_SHAPES:
            self._expected = {}
        self._expected[path] = shape

    def of(self, path: Path) -> ModelShape | None:
        """From the headers of a GGUF file, or of safetensors; None for any other model. Raises OSError and SpecError."""
        ahead = self._ahead(path)
        if ahead is not None:
            return ahead
        key = (str(path), *identity(path.stat()))
        if key in self._known and not path.is_dir():  # what is in a folder may change without it
            return self._known[key]
        if len(self._known) >= MAX_SHAPES:
            self._known = {}
        found = self._known[key] = read_shape(path)
        return found

    def of_gguf(self, path: str) -> ModelShape | None:
        """The same, of what must be a GGUF model. Raises SpecError."""
        if self._ahead(Path(path)) is None:
            check_gguf(path)
        return self.of(Path(path))

    def _ahead(self, path: Path) -> ModelShape | None:
        found = self._expected.get(str(path))
        return None if found is None or path.is_file() else found

    def parts_of(self, path: Path) -> tuple[str, ...]:
        """Every file of a GGUF model, the first part first. Raises SpecError for another part, or when some are missing."""
        known = self._known.get((str(path), *identity(path.stat())))
        return model_parts(str(path)) if known is None else (str(path), *parts_beside(str(path), known.parts))


# The readers are imported when they are first needed, in a thread: the node answers sooner.


def read_shape(path: Path) -> ModelShape | None:
    """By what the file is, not by what it is called: blobs of model caches have no suffix. Raises SpecError."""
    from pool_managerd.models.gguf_shape import read_gguf_shape
    from pool_managerd.models.safetensors_header import is_safetensors, read_safetensors_shape

    if is_gguf(str(path)) or path.suffix.lower() == ".gguf":
        return read_gguf_shape(str(path))
    return read_safetensors_shape(str(path)) if path.is_dir() or is_safetensors(str(path)) else None
