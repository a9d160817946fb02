"""The pictures are those that their sources make, stand still where nothing may move, and show what the code still says."""

from __future__ import annotations

import re
from xml.etree import ElementTree as ET

import pytest
from docs.pictures import diagram, make, terminal

from tests.conftest import REPOSITORY
from tests.core.chart import seen_edges

SOURCE = REPOSITORY / "src/pool_managerd"
NAMES = ["architecture.svg", "demo.svg", "devices.svg", "packages.svg", "states.svg"]


@pytest.mark.parametrize("name", NAMES)
def test_a_picture_is_current(name: str) -> None:
    hint = "it is out of date: run python -m docs.pictures.make"
    assert (make.HERE / name).read_text("utf-8") == make.pictures()[name], hint


@pytest.mark.parametrize("name", NAMES)
def test_a_picture_fetches_nothing_runs_nothing_and_has_words_for_who_cannot_see_it(name: str) -> None:
    text = (make.HERE / name).read_text("utf-8")
    root = ET.fromstring(text)  # noqa: S314 - our own file
    found = {element.tag.rpartition("}")[2] for element in root.iter()}
    assert not found & {"script", "image", "foreignObject", "use", "a"}
    assert not re.search(r"https?://(?!www\.w3\.org|127\.0\.0\.1)|@import|@font-face|url\((?!#)", text)
    assert {"title", "desc"} <= found
    assert "prefers-color-scheme:dark" in text
    assert ("animation" in text) == ("prefers-reduced-motion:reduce" in text)


def test_without_animation_every_line_is_there() -> None:
    shown = terminal.picture([("now", 0.0), ("later", 2.0)], "t", "a")
    assert "opacity:0}to" in shown and not re.search(r"\.at\{[^}]*opacity", shown)
    assert "m0{animation-delay:3s}" in shown


def test_a_line_appears_at_its_own_time_and_a_line_without_one_with_the_next() -> None:
    lines = ["$ x", "", "Title", "  ·   0.50 s  a", "  ✓   1.00 s  b", "end"]
    assert [at for _, at in terminal.timed(lines, 2)] == [0, 1, 1, 1, 2, 2]


def test_every_step_of_the_recorded_demo_is_still_in_the_words_of_the_code() -> None:
    source = "\n".join(path.read_text("utf-8") for path in SOURCE.rglob("*.py"))
    words = re.sub(r"\\?['\"]", "", re.sub(r"\"\s*\n\s*f?\"", "", source))
    lines = make.transcript("demo.txt")
    steps = [found[4] for found in map(terminal.STEP.match, lines) if found]
    assert len(steps) > 8
    for step in steps:
        # what a value was put into is left out: names, numbers, paths, addresses
        literal = [part.strip() for part in re.split(r"'demo'|\S*\d\S*|http\S+|\S*/\S*|[':;,]", step) if len(part.strip()) > 3]
        missing = [part for part in literal if part not in words]
        assert not missing, f"the recording is out of date ({step!r}): run make pictures"


def test_the_demo_in_the_picture_worked() -> None:
    lines = make.transcript("demo.txt")
    assert "  The capital of France is Paris." in lines
    assert "nothing is left behind" in lines[-1]


def test_the_states_are_those_that_users_see() -> None:
    states = {state for edge in seen_edges() for state in edge}
    assert states == {
        "uninitialized", "provisioning", "starting", "ready", "draining", "stopping", "backoff", "offline", "failed",
        "sleeping",
    }  # fmt: skip


def test_the_usual_ways_are_ways() -> None:
    usual = {(start, end) for start, ends in make.source("states.toml")["usual"].items() for end in ends}
    assert usual <= seen_edges()


def test_a_state_without_a_place_is_noticed() -> None:
    source = make.source("states.toml")
    with pytest.raises(KeyError, match="asleep"):
        diagram.states(source, {("ready", "asleep"): "blue"}, "about")
