"""The kinds of values that keys take, and how a text becomes one."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from pool_managerd.core.engines import ENGINES, known_engine
from pool_managerd.core.gpu.masks import DeviceMask
from pool_managerd.core.narration import parse_size
from pool_managerd.errors import SpecError

POOL_ID_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$"

Engine = Annotated[str, AfterValidator(known_engine), Field(json_schema_extra=lambda schema: schema.update(enum=list(ENGINES)))]
Mode = Literal["external", "source", "container", "package", "binary"]
Profile = Literal["home", "cloud", "dev"]
RestartPolicy = Literal["on-failure", "always", "never"]
Port = Annotated[int, Field(ge=1, le=65535)]
Digest = Annotated[str, Field(pattern=r"^sha256:[0-9a-fA-F]{64}$")]
Digests = Annotated[tuple[Digest, ...], Field(min_length=1)]
NonNegative = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]


def _bytes(value: Any) -> Any:
    """A size such as ``28GiB`` as a number; anything else as it is."""
    return parse_size(value) if isinstance(value, str) else value


def _devices(value: Any) -> Any:
    """A text with commas is a list; what it means is checked here, what exists only when a pool starts."""
    if value is None or value in ([], ()):
        return ()
    if isinstance(value, str | list | tuple | int) and not isinstance(value, bool):
        try:
            return DeviceMask.parse(",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)).items
        except SpecError as error:
            raise ValueError(error.message.rpartition("': ")[2]) from error
    return value


Bytes = Annotated[Positive, BeforeValidator(_bytes, json_schema_input_type=int | str)]
Devices = Annotated[tuple[NonNegative | str, ...], BeforeValidator(_devices)]


NOT_IN_FORCE = "Not in force yet."
"""What the description of a key says that nothing reads."""


class Section(BaseModel):
    """A strict, immutable part of the configuration: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def is_pool_id(text: str) -> bool:
    """True when ``text`` may name a pool: it becomes part of file names, so nothing but a safe slug passes."""
    return bool(re.fullmatch(POOL_ID_PATTERN, text)) and ".." not in text


def _address(value: str) -> str:
    split_address(value)
    return value


Address = Annotated[str, AfterValidator(_address)]
"""HOST:PORT."""


def path_from(base: Path, written: str | Path) -> Path:
    """The absolute path that is ``written`` in a file of the folder ``base``; ``~`` is a home, of an unknown user only a name."""
    return base.absolute() / os.path.expanduser(written)  # noqa: PTH111 - pathlib's raises for an unknown user


def split_address(text: str) -> tuple[str, int]:
    """``host:port`` or ``[v6]:port`` as a pair. Raises ValueError with the remedy."""
    host, colon, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise ValueError(f"{text!r} is not HOST:PORT; write an IPv6 address in brackets, as [::1]:9200")
    if not (colon and host and port.isdigit() and int(port) <= 65535):
        raise ValueError(f"{text!r} is not HOST:PORT, as 127.0.0.1:9200")
    return host, int(port)
