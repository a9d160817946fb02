"""What coding agents send anew in each request does not reach the engine; everything else does, as it was written."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pool_managerd.config.pools import RequestRules
from pool_managerd.gateway.agent_lines import without
from pool_managerd.gateway.asked import in_json
from pool_managerd.gateway.directory import Place
from pool_managerd.gateway.rules import for_engine
from tests.gateway.lab import lab

BILLING = "x-anthropic-billing-header: cc_version=2.1.37.0d9; cc_entrypoint=cli; cch=fa690;"
LEFT = "<total_tokens>14800000 tokens left</total_tokens>"
PROMPT = "You are an agent.\nBe brief."


def text(of: str, **more: Any) -> dict[str, Any]:
    return {"type": "text", "text": of, **more}


def user(*blocks: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(blocks)}


def system(content: Any) -> dict[str, Any]:
    return {"role": "system", "content": content}


HELLO = {"role": "user", "content": "Hello"}
RESULT = {"type": "tool_result", "tool_use_id": "t", "content": LEFT}
CACHED = {"cache_control": {"type": "ephemeral"}}


@pytest.mark.parametrize(
    ("sent", "left"),
    [
        # Anthropic: blocks, one text, the marker in front of the prompt itself.
        ({"system": [text(BILLING), text(PROMPT, **CACHED)]}, {"system": [text(PROMPT, **CACHED)]}),
        ({"system": [text(f"{BILLING}\n{PROMPT}")]}, {"system": [text(PROMPT)]}),
        ({"system": f"{BILLING}\n{PROMPT}", "max_tokens": 4}, {"system": PROMPT, "max_tokens": 4}),
        ({"system": [text(BILLING)], "n": 1}, {"n": 1}),
        ({"system": [text(PROMPT), text(LEFT)]}, {"system": [text(PROMPT)]}),
        ({"system": f"{PROMPT}\n{LEFT}\nBe kind.\n  {LEFT}"}, {"system": f"{PROMPT}\nBe kind.\n"}),
        # The countdown after prompts and results.
        ({"messages": [HELLO, system(LEFT)]}, {"messages": [HELLO]}),
        ({"messages": [HELLO, system([text(LEFT)]), HELLO]}, {"messages": [HELLO, HELLO]}),
        ({"messages": [HELLO, system(f"{LEFT}\nIt rains.")]}, {"messages": [HELLO, system("It rains.")]}),
        ({"messages": [user(RESULT, text(LEFT))]}, {"messages": [user(RESULT)]}),
        ({"messages": [user(text("a"), text(f"{LEFT}\n"), RESULT)]}, {"messages": [user(text("a"), RESULT)]}),
        # OpenAI, as translators make it.
        ({"messages": [system(f"{BILLING}\n{PROMPT}"), HELLO]}, {"messages": [system(PROMPT), HELLO]}),
        ({"messages": [system([text(BILLING), text(PROMPT)]), HELLO]}, {"messages": [system([text(PROMPT)]), HELLO]}),
        ({"messages": [system(BILLING), HELLO]}, {"messages": [HELLO]}),
        ({"instructions": f"{BILLING}\r\n{PROMPT}", "input": "Hello"}, {"instructions": PROMPT, "input": "Hello"}),
        (
            {"input": [{"role": "developer", "content": [{"type": "input_text", "text": BILLING}]}, HELLO]},
            {"input": [HELLO]},
        ),
    ],
)  # fmt: skip
def test_they_are_left_out(sent: dict[str, Any], left: dict[str, Any]) -> None:
    found = without(sent)
    assert found == left and list(found) == list(left) and without(found) == found


@pytest.mark.parametrize(
    "sent",
    [
        {"system": [text(PROMPT), text(BILLING)]},  # not where agents put it
        {"system": f"{PROMPT}\n{BILLING}"},
        {"messages": [HELLO, system(f"{BILLING}\n{PROMPT}")]},
        {"messages": [{"role": "user", "content": f"{BILLING}\nWhat is this?"}]},
        {"messages": [{"role": "user", "content": LEFT}, user(text(LEFT)), user(RESULT)]},
        {"messages": [{"role": "assistant", "content": LEFT}, {"role": "tool", "content": LEFT}]},
        {"messages": [user(text("a"), text(f"I saw {LEFT} in a log"))]},
        {"system": f"{PROMPT} {LEFT}"},
        {"system": "", "instructions": None, "messages": "no list", "input": [None, 5, {"role": "system"}, {"content": LEFT}]},
        {"system": [{"type": "image", "text": BILLING}, BILLING, {"type": "text", "text": 5}], "messages": []},
        {"system": "<total_tokens>many tokens left</total_tokens>"},
    ],
)
def test_everything_else_stays(sent: dict[str, Any]) -> None:
    assert without(sent) == sent


JSON = st.recursive(
    st.none() | st.booleans() | st.text(max_size=5) | st.sampled_from([BILLING, LEFT, "system", "user", "text"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["role", "content", "type", "text", "system", "messages", "input"]), inner, max_size=4
    ),
    max_leaves=12,
)  # fmt: skip


@given(st.dictionaries(st.sampled_from(["system", "messages", "input", "instructions", "n"]), JSON))
def test_whatever_is_sent_it_never_fails_and_twice_is_once(sent: dict[str, Any]) -> None:
    before = json.dumps(sent)
    once = without(sent)
    assert json.dumps(sent) == before and without(once) == once


RULES = RequestRules(agent_friendly=True).model_dump(mode="json")
PLACE = Place.of({"pool_id": "m", "rules": RULES})


def test_a_body_without_them_is_the_same_bytes() -> None:
    for written in (b'{ "model": "m", "temperature": 1.50 }', b'{ "model":"m", "prompt": "3 tokens left" , "n": 1.50 }'):
        assert for_engine(in_json(written), PLACE) == written


async def test_they_are_left_out_where_the_pool_says_so_and_nowhere_else() -> None:
    sent = {"model": "m", "system": [text(BILLING), text(PROMPT)], "messages": [HELLO], "stream": False}
    for rules in (RULES, RequestRules(agent_friendly=True, default={"top_k": 1}).model_dump(mode="json"), None):
        async with lab(rules=rules) as one:
            for path in ("/v1/messages", "/v1/messages/count_tokens"):
                _, answer = await one.ask(sent, path)
                got = json.loads(answer["body"])
                assert got.pop("top_k", 1) == 1 and list(got) == list(sent)
                assert got == (sent if rules is None else {**sent, "system": [text(PROMPT)]})
