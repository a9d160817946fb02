"""Where models have come from: a line each, whole whenever the machine stops, without what gives access."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from pool_managerd.models import provenance
from pool_managerd.models.provenance import Origin, Provenance
from tests.models.fetching import fetching
from tests.models.hub_app import COMMIT, Hub
from tests.models.kills import killed_at_each


def origin(number: int) -> Origin:
    return Origin(number, "hf:org/repo:Q8_0", "hf/org/repo/c0/a.gguf", 4, "sha256:0", "https://hub.example/a.gguf", "c0", '"1"')


def test_a_line_that_is_killed_at_any_moment_costs_no_other_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def appending(number: int) -> partial[None]:
        kept = Provenance(_made(tmp_path / f"{number}"))
        kept.append(origin(1))
        return partial(kept.append, origin(2))

    for number in killed_at_each(monkeypatch, appending):
        kept = Provenance(tmp_path / f"{number}")
        assert list(kept.all()) in ([origin(1)], [origin(1), origin(2)])
        kept.append(origin(3))
        assert list(kept.all())[-1] == origin(3) and origin(1) in kept.all()
        assert kept.path.read_bytes().count(b"\n") == len(list(kept.all())), "what was torn is cut off"


def test_what_is_no_line_of_ours_is_passed_over(tmp_path: Path) -> None:
    kept = Provenance(tmp_path)
    kept.path.write_bytes(b'[]\n{"ts_ms": 1}\n\xff\xfe\n{"torn": "' + b"x" * 5000)
    kept.append(origin(1))
    assert list(kept.all()) == [origin(1)] and b"xx" not in kept.path.read_bytes()


def test_it_is_bounded_and_the_latest_lines_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "MAX_BYTES", 2000)
    kept = Provenance(tmp_path)
    for number in range(50):
        kept.append(origin(number))
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 4000
    found = [one.ts_ms for one in kept.all()]
    assert found == list(range(found[0], 50)) and len(found) > 10


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


async def test_a_download_is_written_down_with_its_source_and_no_secret_of_its_address(tmp_path: Path) -> None:
    body = b"GGUF\x03\x00\x00\x00 of a model"
    hub = await Hub(files={"a-Q8_0.gguf": body, "m.gguf": body + b"2"}).start()
    try:
        async with fetching(tmp_path, hub.url) as f:
            await f.models.ensure_present("hf:org/repo:Q8_0")
            await f.models.ensure_present("hf:org/repo:Q8_0")
            await f.models.ensure_present(f"{hub.url}/m.gguf?signature=secret")
        first, second = Provenance(f.cache.books).all()
        assert (first.ref, first.revision, first.etag, first.size_bytes) == ("hf:org/repo:Q8_0", COMMIT, '"1"', len(body))
        assert (f.cache.root / first.path).read_bytes() == body and first.digest.startswith("sha256:")
        assert second.source == f"{hub.url}/m.gguf"
        assert "secret" not in Provenance(f.cache.books).path.read_text()
    finally:
        await hub.close()
