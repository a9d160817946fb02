"""Every relative link in the documentation leads somewhere, headings included."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
_FENCE = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"`[^`\n]*`")
_LINK = re.compile(r"!?\[[^\]]*\]\(\s*<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)|^\[[^\]]+\]:\s*(\S+)", re.MULTILINE)
_HEADING = re.compile(r"^#{1,6}\s+(.+?)\s*#*$", re.MULTILINE)


def documents() -> list[Path]:
    top = [REPOSITORY / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")]
    return [path for path in top if path.exists()] + sorted((REPOSITORY / "docs").rglob("*.md"))


def links(text: str) -> Iterator[str]:
    prose = _INLINE.sub("", _FENCE.sub("", text))
    for found in _LINK.finditer(prose):
        yield found[1] or found[2]


def anchors(text: str) -> set[str]:
    """Anchors of the headings, as GitHub makes them."""
    names = set()
    for found in _HEADING.finditer(_FENCE.sub("", text)):
        plain = re.sub(r"[`*_]|\[([^\]]*)\]\([^)]*\)", r"\1", found[1]).lower()
        names.add(re.sub(r"[^\w\- ]", "", plain).strip().replace(" ", "-"))
    return names


def broken(document: Path, text: str) -> list[str]:
    found = []
    for link in links(text):
        target, _, anchor = unquote(link).partition("#")
        if re.match(r"[a-z][a-z0-9+.-]*:", target):
            continue
        path = (document.parent / target) if target else document
        if path != document and not path.exists():
            found.append(f"{link}: there is no {target}")
        elif anchor and path.suffix == ".md" and anchor not in anchors(text if path == document else path.read_text("utf-8")):
            found.append(f"{link}: no heading makes #{anchor}")
    return found


@pytest.mark.parametrize("document", documents(), ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_every_relative_link_leads_somewhere(document: Path) -> None:
    assert broken(document, document.read_text("utf-8")) == []


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    text = "# A b\n[x](#a-b) [y](#c) [z](nowhere.md) `[w](no.md)` [v](https://example.org)\n```\n[u](no.md)\n```\n"
    assert broken(tmp_path / "d.md", text) == ["#c: no heading makes #c", "nowhere.md: there is no nowhere.md"]


def test_the_site_leads_to_every_page() -> None:
    nav = (REPOSITORY / "mkdocs.yml").read_text("utf-8").partition("nav:")[2]
    pages = {str(page.relative_to(REPOSITORY / "docs")) for page in (REPOSITORY / "docs").rglob("*.md")}
    assert pages == set(re.findall(r"[\w/-]+\.md", nav))


def test_every_file_that_the_architecture_names_is_there() -> None:
    source = REPOSITORY / "src/pool_managerd"
    text = (REPOSITORY / "docs/explanation/architecture.md").read_text("utf-8")
    named = {name for name in re.findall(r"`([a-z_/]+(?:\.py|/))`", text) if name not in ("docs/",)}
    files = [path.relative_to(source).as_posix() for path in source.rglob("*") if path.suffix == ".py" or path.is_dir()]
    missing = [n for n in named if not any(f == n.rstrip("/") or f.endswith("/" + n.rstrip("/")) for f in files)]
    assert len(named) > 40 and missing == []
