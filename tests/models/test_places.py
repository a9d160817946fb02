"""Where other tools keep models."""

from __future__ import annotations

from pathlib import Path

import pytest

from pool_managerd.config import Config
from pool_managerd.config.model_places import TOOLS
from pool_managerd.config.model_sections import ModelsConfig
from pool_managerd.models.places import Layout, places_of

HOME = Path("/home/ann")


def roots(*names: str, **env: str) -> list[str]:
    return [str(place.root) for place in places_of(names, env, HOME)]


def test_each_tool_is_looked_for_where_it_is_by_default() -> None:
    assert roots(*TOOLS) == [
        "/home/ann/.cache/huggingface/hub", "/home/ann/.lmstudio/models", "/home/ann/.cache/lm-studio/models",
        "/home/ann/.cache/llama.cpp", "/home/ann/.ollama/models", "/usr/share/ollama/.ollama/models",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("tool", "env", "root"),
    [
        ("huggingface", {"HF_HUB_CACHE": "/a", "HF_HOME": "/b"}, "/a"),
        ("huggingface", {"HUGGINGFACE_HUB_CACHE": "/a"}, "/a"),
        ("huggingface", {"HF_HOME": "/b"}, "/b/hub"),
        ("huggingface", {"XDG_CACHE_HOME": "/c"}, "/c/huggingface/hub"),
        ("huggingface", {"HF_HOME": "relative"}, "/home/ann/.cache/huggingface/hub"),
        ("llama.cpp", {"LLAMA_CACHE": "/d"}, "/d"),
        ("ollama", {"OLLAMA_MODELS": "/e"}, "/e"),
    ],
)
def test_a_tools_own_variables_are_heeded(tool: str, env: dict[str, str], root: str) -> None:
    assert roots(tool, **env) == [root]


def test_a_directory_may_have_any_layout_and_each_is_looked_at_once() -> None:
    (place,) = places_of(["/srv/models/"], {}, HOME)
    assert place.root == Path("/srv/models") and set(place.layouts) == set(Layout)
    assert roots("~/more") == ["/home/ann/more"]
    hub, rest = places_of(["huggingface", "llama.cpp"], {"HF_HUB_CACHE": "/m", "LLAMA_CACHE": "/m"}, HOME)
    assert (hub.layouts, rest.layouts) == ((Layout.HUB,), (Layout.FLAT,))


def test_the_daemons_own_user_is_the_default_but_in_cloud() -> None:
    assert Config().models_elsewhere == TOOLS
    assert Config(profile="cloud").models_elsewhere == ()
    chosen = ModelsConfig.model_validate({"elsewhere": ["/srv/models"]})
    assert Config(profile="cloud", models=chosen).models_elsewhere == ("/srv/models",)
    assert Config(models=ModelsConfig.model_validate({"elsewhere": []})).models_elsewhere == ()


@pytest.mark.parametrize("wrong", ["hugging-face", "models", "../models", "", "/srv/\0"])
def test_what_is_neither_a_tool_nor_a_place_is_refused(wrong: str) -> None:
    with pytest.raises(ValueError, match=r"must be huggingface|at least 1|match pattern"):
        ModelsConfig.model_validate({"elsewhere": [wrong]})
