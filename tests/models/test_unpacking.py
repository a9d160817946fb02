"""Archives that somebody made who means no good, or whose tool was broken: refused by name, nothing of them stays."""

from __future__ import annotations

import gc
import gzip
import io
import tarfile
import threading
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from pool_managerd.models import archive_reader, layered
from pool_managerd.models.archive_reader import ArchiveError, Member, StoppedError, opened
from pool_managerd.models.layered import Layered
from tests.models.archives import device, folder, link, tar_of
from tests.models.registry_app import Registry
from tests.models.test_unpacked_fetch import BESIDE, MODEL, below, refusal


@pytest.fixture
async def registry() -> AsyncIterator[Registry]:
    made = await Registry().start()
    yield made
    await made.close()


def _headers_in_memory() -> int:
    return sum(isinstance(one, tarfile.TarInfo) for one in gc.get_objects())


def read(tmp_path: Path, archive: bytes) -> list[tuple[Member, bytes]]:
    path = tmp_path / "a.tar"
    path.write_bytes(archive)
    with opened(path, threading.Event(), lambda _: None) as members:
        return [(member, b"".join(content()) if member.kind == "file" else b"") for member, content in members]


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


def sparse(name: str) -> bytes:
    """One byte in the archive that would be a terabyte on the disk."""
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo(name)
        info.size = 1
        info.pax_headers = {"GNU.sparse.map": "0,1", "GNU.sparse.size": str(1 << 40), "GNU.sparse.name": name}
        tar.addfile(info, io.BytesIO(b"x"))
    return made.getvalue()


NUL = b"\0" * 1024
EVIL: dict[str, tuple[bytes, str]] = {
    "a name that leads out": (tar_of(below("models", MODEL) | {"models/../../../etc/cron.d/x": b"x"}), "leads out of it"),
    "a link that leads out": (
        tar_of(below("models", BESIDE) | {"models/model.safetensors": link("../../../etc/shadow")}), "no safetensors weights"
    ),
    "a link to an address of this machine": (
        tar_of(below("models", BESIDE) | {"models/model.safetensors": link("/etc/shadow", hard=True)}), "no safetensors weights"
    ),
    "a folder that is a link": (
        tar_of({"models": link("/etc"), **below("models", BESIDE)}), "no safetensors weights"
    ),
    "a device": (tar_of(below("models", BESIDE) | {"models/model.safetensors": device}), "no safetensors weights"),
    "a sparse file": (sparse("models/model.safetensors"), "without a model in /models"),
    "names that differ in case": (
        tar_of(below("models", MODEL) | {"models/Tokenizer.json": b"[]"}), "some disks cannot tell"
    ),
    "names that differ in how they are written": (
        tar_of(below("models", MODEL) | {"models/\u00e9.json": b"1", "models/e\u0301.json": b"2"}), "some disks cannot tell"
    ),
    "pickles": (tar_of(below("models", BESIDE) | {"models/pytorch_model.bin": b"PK"}), "POLICY_DENIED"),
    "code": (
        tar_of(below("models", MODEL) | {"models/config.json": b'{"auto_map": {"AutoModel": "evil.M"}}'}), "has evil.py run"
    ),
    "a file without its end": (tar_of(below("models", MODEL))[:1500], "cannot be unpacked"),
    "a damaged header": (tar_of(below("models", MODEL)).replace(b"models/model.saf", b"models/MODEL.saf"), "is damaged"),
    "damaged compression": (gzip.compress(tar_of(below("models", MODEL)))[:-60], "compressed bytes are wrong"),
    "a name without end": (header("././@LongLink", 1 << 40, tarfile.GNUTYPE_LONGNAME) + NUL, "longer than a header"),
    "headers within headers": (
        (header("x", 12, tarfile.XHDTYPE) + b"12 a=bbbbbb\n".ljust(512, b"\0")) * 5_000 + NUL, "recursion depth"
    ),
    "more bytes than there are": (header("models/config.json", 1 << 62) + NUL, "cannot be unpacked"),
    "no archive": (b"<html>not found</html>" * 100, "it is no tar archive"),
    "nothing": (b"", "it is no tar archive"),
    "an image of something else": (tar_of({"bin/sh": b"#", "app/model.gguf": b"GGUF"}), "it has: /app, /bin"),
    "zstd": (b"\x28\xb5\x2f\xfd" + NUL, "compressed with zstd"),
    "a model twice": (tar_of({"models/a.gguf": b"GGUF", "models/b.gguf": b"GGUF"}), "it has 2 models: a.gguf, b.gguf"),
    "half of a model": (tar_of({"models/m-00001-of-00002.gguf": b"GGUF"}), "m-00002-of-00002.gguf"),
}  # fmt: skip


@pytest.mark.parametrize("what", EVIL)
async def test_it_is_refused_and_nothing_of_it_is_there(registry: Registry, tmp_path: Path, what: str) -> None:
    archive, why = EVIL[what]
    registry.put_image("1", archive)
    assert why in await refusal(registry, tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.name in {"x", "model.safetensors", "shadow"}]


def test_a_bomb_is_not_read_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive_reader, "FREE_BYTES", 1 << 20)
    bomb = gzip.compress(header("models/config.json", 32 << 20) + bytes(32 << 20))
    with pytest.raises(ArchiveError, match="more than 200 times as large"):
        read(tmp_path, bomb)


def test_archives_of_very_many_files_are_not_kept_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive_reader, "MAX_MEMBERS", 1_000)
    with pytest.raises(ArchiveError, match="more than 1000 files"):
        read(tmp_path, header("models/x", 0) * 1_001 + NUL)
    path = tmp_path / "b.tar"
    path.write_bytes(header("models/x", 0) * 900 + NUL)
    with opened(path, threading.Event(), lambda _: None) as members:
        before = _headers_in_memory()
        kept = [_headers_in_memory() - before for member, _ in members if member.number == 899]
    assert len(kept) == 1 and kept[0] < 100
    monkeypatch.setattr(layered, "MAX_FILES", 10)
    with pytest.raises(ArchiveError, match="more than 10 files"):
        Layered("models").add(0, [Member(n, f"models/{n}", "file") for n in range(11)])
    Layered("models").add(0, [Member(n, f"usr/{n}", "file") for n in range(11)])


def test_of_a_file_that_ends_in_the_middle_nothing_is_taken_for_it(tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match="ends in the middle"):
        read(tmp_path, tar_of({"a": bytes(3_000)})[:1_500])


def test_a_header_cannot_lead_back(tmp_path: Path) -> None:
    back = bytearray(header("a", 0))
    back[124:136] = (-2048 % (1 << 96)).to_bytes(12, "big")
    back[148:156] = f"{sum(back[:148] + b' ' * 8 + back[156:]):06o}\0 ".encode()
    with pytest.raises(ArchiveError):
        read(tmp_path, header("a", 0) * 8 + bytes(back) + NUL)


def test_whoever_wants_it_no_more_is_heard_in_the_middle(tmp_path: Path) -> None:
    path, stop = tmp_path / "a.tar", threading.Event()
    path.write_bytes(tar_of({"a": bytes(3 << 20)}))
    with opened(path, stop, lambda _: None) as members:
        _, content = next(members)
        blocks = content()
        next(blocks)
        stop.set()
        with pytest.raises(StoppedError):
            next(blocks)


# --- layers ---


def files(inside: str, *layers: Mapping[str, Any]) -> dict[str, int]:
    """By path, the layer that it is of. What is no content is ``folder``, or where a link leads."""
    made = Layered(inside)
    for number, layer in enumerate(layers):
        made.add(number, [_member(n, path, said) for n, (path, said) in enumerate(layer.items())])
    return {path: found.layer for path, found in made.files().items()}


def _member(number: int, path: str, said: object) -> Member:
    if isinstance(said, str):
        return Member(number, path, "symlink", 0, said)
    return Member(number, path, "folder" if said is folder else "file", 1)


@pytest.mark.parametrize(
    ("layers", "there"),
    [
        ([{"models/a": 1}, {"models/a": 2, "models/b": 2}], {"a": 1, "b": 1}),
        ([{"models/a": 1, "models/d/x": 1}, {"models/.wh.a": 0, "models/.wh.d": 0}], {}),
        ([{"models/a": 1, "models/b": 1}, {"models/c": 1, "models/.wh..wh..opq": 0}], {"c": 1}),
        ([{"models/a": 1}, {".wh.models": 0}], {}),
        ([{"models/a": 1}, {".wh..wh..opq": 0, "models/b": 1}], {"b": 1}),
        ([{"models/a": 1}, {"models/.wh.a": 0, "models/a": 2}], {"a": 1}),
        ([{"models/a/b": 1}, {"models/a": 1}], {"a": 1}),
        ([{"models/a": 1}, {"models/a/b": 1}], {"a/b": 1}),
        ([{"models/a/b": 1}, {"models/a": folder}], {"a/b": 0}),
        ([{"models/a": 1}, {"models/l": "a", "models/up": "../models/a", "models/out": "../../a"}], {"a": 0, "l": 0, "up": 0}),
        ([{"models/a": "b", "models/b": "a"}], {}),
        ([{"models/.wh.a": 0}, {"model/x": 1, "modelsx": 1}], {}),
    ],
)  # fmt: skip
def test_layers_lie_over_each_other(layers: list[dict[str, Any]], there: dict[str, int]) -> None:
    assert files("models", *layers) == there


def test_of_what_is_no_image_nothing_is_removed() -> None:
    assert files("", {"a": 1}, {".wh.a": 1, "b/c": 1}) == {"a": 0, ".wh.a": 1, "b/c": 1}


def test_a_link_that_leads_out_does_not_come_back_in() -> None:
    assert files("", {"a": 1, "b/out": "../../a", "b/in": "../a", "b/top": "/a"}) == {"a": 0, "b/in": 0, "b/top": 0}


def test_what_no_engine_asks_for_is_passed_over() -> None:
    odd = ["models/" + "d/" * 40 + "x", "models/a\nb", "models/" + "x" * 300, "models/a\\b", "models/\udce9"]
    assert files("models", dict.fromkeys(odd, 1)) == {}
