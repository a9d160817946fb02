"""Files of other tools: which may be used at all."""

from __future__ import annotations

import grp
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from pool_managerd.models.foreign_files import ForeignFile, doubt, foreign_file, is_unfinished, names_below, read_small

ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root makes files of others")


def made(root: Path, name: str = "org/repo/m.gguf", body: bytes = b"GGUF") -> ForeignFile:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(body)
    for one in (path, *path.parents):
        if one.is_relative_to(root):
            one.chmod(0o755 if one.is_dir() else 0o644)
    return ForeignFile(name, path, root, len(body))


def test_a_file_of_the_daemons_user_is_used(tmp_path: Path) -> None:
    assert doubt(made(tmp_path)) == ""


@pytest.mark.parametrize("which", ["org/repo/m.gguf", "org/repo", "org", ""])
def test_what_every_user_could_change_is_not_used(tmp_path: Path, which: str) -> None:
    file, place = made(tmp_path), tmp_path / which
    place.chmod(place.stat().st_mode | 0o002)
    assert doubt(file) == f"{place} could be changed by every user: chmod o-w {place}"


@ROOT
def test_what_another_user_has_is_used_where_the_whole_place_is_theirs(tmp_path: Path) -> None:
    file = made(tmp_path)
    os.chown(file.place, 4242, 4242)
    assert doubt(file) == f"{file.place} belongs to user 4242, who could change it while it is used"
    os.chown(tmp_path, 4242, 4242)  # whoever names that place in the configuration means its owner
    assert doubt(file) == ""


@ROOT
def test_a_group_may_write_only_where_nobody_else_is_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = made(tmp_path)
    os.chown(file.place, 0, 4242)
    file.place.chmod(0o664)
    assert "could be changed by its group" in doubt(file)
    monkeypatch.setattr(grp, "getgrgid", lambda _: SimpleNamespace(gr_name="root", gr_mem=[]))
    monkeypatch.setattr("pwd.getpwuid", lambda _: SimpleNamespace(pw_name="root", pw_gid=4242))
    assert doubt(file) == ""
    monkeypatch.setattr(grp, "getgrgid", lambda _: SimpleNamespace(gr_name="root", gr_mem=["eve"]))
    assert "could be changed by its group" in doubt(file)


def test_what_is_above_the_place_must_not_be_replaceable_either(tmp_path: Path) -> None:
    above = tmp_path / "above"
    file = made(above / "root")
    above.chmod(0o777)
    assert doubt(file) == f"what is in {above} could be replaced by every user: chmod o-w {above}"
    above.chmod(0o1777)  # as /tmp is
    assert doubt(file) == ""


def test_a_link_is_followed_within_the_place_alone(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside.gguf"
    inside = made(root)
    outside.write_bytes(b"GGUF")
    (root / "in.gguf").symlink_to(inside.place)
    (root / "out.gguf").symlink_to(outside)
    (root / "gone.gguf").symlink_to(tmp_path / "nowhere")
    assert doubt(ForeignFile("in.gguf", root / "in.gguf", root, 4)) == ""
    assert "leads out of" in doubt(ForeignFile("out.gguf", root / "out.gguf", root, 4))
    assert "cannot be read: No such file" in doubt(ForeignFile("gone.gguf", root / "gone.gguf", root, 4))
    assert foreign_file("gone.gguf", root / "gone.gguf", root) is None
    (root / "circle.gguf").symlink_to(root / "circle.gguf")
    assert "cannot be read" in doubt(ForeignFile("circle.gguf", root / "circle.gguf", root, 4))
    linked = tmp_path / "linked"
    linked.symlink_to(root)  # the place itself may be one
    assert doubt(ForeignFile("in.gguf", linked / "in.gguf", linked, 4)) == ""


@pytest.mark.parametrize(
    "name",
    ["a.gguf.incomplete", "sha256-ab-partial", "a.gguf.downloadInProgress", "downloading_a.gguf", ".a.gguf", "a.part", "a.tmp"],
)  # fmt: skip
def test_what_is_being_downloaded_is_never_taken(tmp_path: Path, name: str) -> None:
    assert is_unfinished(name) and not is_unfinished("a.gguf")
    (tmp_path / name).write_bytes(b"GGUF")
    assert list(names_below(tmp_path)) == []


def test_pipes_folders_and_empty_files_are_no_models(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.gguf")
    (tmp_path / "empty.gguf").touch()
    for name in ("pipe.gguf", "empty.gguf", "."):
        assert foreign_file(name, tmp_path / name, tmp_path) is None
    with pytest.raises(OSError, match="no file"):
        read_small(tmp_path / "pipe.gguf", 8)


def test_names_are_found_in_folders_but_not_through_links_nor_without_end(tmp_path: Path) -> None:
    made(tmp_path, "a/b.gguf")
    made(tmp_path, "deep/" * 9 + "c.gguf")
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "bad\nname.gguf").write_bytes(b"GGUF")
    assert list(names_below(tmp_path)) == ["a/b.gguf"]
