"""``chat``, ``requests``, ``cancel`` and ``keys``: what they print, and what they make of engines that answer oddly."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from http.server import ThreadingHTTPServer
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from pool_managerd.cli.exits import REFUSED, USAGE
from pool_managerd.gateway.keys import KeyFile
from tests.cli.pages import Page, answering
from tests.cli.test_commands import Invoke
from tests.cli.test_crashes import at_80_columns

ROW = {
    "request_id": "r1", "path": "/v1/chat/completions", "key": None, "model": "m", "pool_id": "m", "state": "ended",
    "status": 200, "error": None, "began_at_ms": 1, "queued_ms": 3, "first_token_ms": 40, "duration_ms": 900, "tokens_in": 12,
    "tokens_cached": None, "tokens_out": 34, "decode_time_ms": 860,
}  # fmt: skip


class Scripted(ThreadingHTTPServer):
    """Answers a chat with these lines."""

    lines: tuple[bytes, ...] = (b'data: {"choices":[{"delta":{"content":"Hi"}}]}', b"", b"data: [DONE]", b"")
    kind = "text/event-stream"
    said: Mapping[str, Any] = MappingProxyType({"captured": None, "not_captured": "newer ones needed the room"})

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Answers(Page):
    server: Scripted

    def do_GET(self) -> None:
        pages: dict[str, Any] = {"/v1/requests": [ROW], "/v1/requests/r1": {**ROW, **self.server.said}}
        self.answer(200, json.dumps(pages.get(self.path, {"data": [{"id": "m"}]})).encode(), "application/json")

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.answer(200, b"\n".join(self.server.lines), self.server.kind)

    def do_DELETE(self) -> None:
        error = {"error": {"message": f"request '{self.path.rpartition('/')[2]}' is not in flight", "code": "ticket_not_found"}}
        self.answer(404, json.dumps(error).encode(), "application/json")


@pytest.fixture
def scripted() -> Iterator[Scripted]:
    with answering(Scripted(("127.0.0.1", 0), Answers)) as server:
        yield server


def test_the_only_model_answers(invoke: Invoke, scripted: Scripted) -> None:
    assert invoke("chat", "-m", "Hello", "--url", scripted.url) == (0, "Hi\n", "")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"data: null", "no JSON object"),
        (b"data: {oops", "no JSON object"),
        (b'data: {"error": "odd"}', "odd"),
        (b'data: {"error": {"message": "the engine ended"}}', "the engine ended"),
    ],
)
def test_what_is_no_answer_is_said(invoke: Invoke, scripted: Scripted, line: bytes, said: str) -> None:
    scripted.lines = (line, b"", b"")
    code, _, err = invoke("chat", "m", "-m", "Hello", "--url", scripted.url)
    assert code == REFUSED and said in err and "Traceback" not in err


@pytest.mark.parametrize(
    "line", [b'data: {"choices":[{}]}', b'data: {"choices":{}}', b'data: {"choices":[{"delta":{"content":7}}]}']
)
def test_what_says_nothing_is_no_error(invoke: Invoke, scripted: Scripted, line: bytes) -> None:
    scripted.lines = (line, b"", b'data:{"choices":[{"delta":{"content":"ok"}}]}', b"", b"")
    assert invoke("chat", "m", "-m", "Hello", "--url", scripted.url) == (0, "ok\n", "")


def test_an_answer_that_is_no_stream_is_said(invoke: Invoke, scripted: Scripted) -> None:
    scripted.kind = "application/json"
    code, _, err = invoke("chat", "m", "-m", "Hello", "--url", scripted.url)
    assert code == REFUSED and "asked for a stream, and sent none" in err


@pytest.mark.parametrize("url", ["http://127.0.0.1:1x", "http://127.0.0.1:99999", "127.0.0.1:1", "ftp://a", "http://[::1"])
def test_an_address_that_is_none_is_said(invoke: Invoke, url: str) -> None:
    code, _, err = invoke("chat", "m", "-m", "Hello", "--url", url)
    assert code == USAGE and "as the gateway's URL" in err


def test_requests_are_a_table_and_cancel_names_the_one_that_is_not_there(invoke: Invoke, scripted: Scripted) -> None:
    code, out, err = invoke("requests", "--url", scripted.url)
    assert (code, err) == (0, "") and " ".join(out.splitlines()[1].split()) == "r1 m ended 0 s 0 s 1 s 12 34 200"
    code, _, err = invoke("cancel", "nope", "--url", scripted.url)
    assert code == REFUSED and "request 'nope' is not in flight" in err


def body(text: str | None, kind: str, **other: Any) -> dict[str, Any]:
    return {"headers": {"content-type": kind}, "bytes": len(text or "x"), "text": text, "truncated": False, **other}


def test_a_request_is_shown_with_what_it_says(invoke: Invoke, scripted: Scripted) -> None:
    said = json.dumps({"model": "m", "messages": ["Grüße \x1b[31m"]}, ensure_ascii=False)
    stream = 'data: {"a":\x1b[2J 1}\n\ndata: [DONE]\n\n'
    scripted.said = {
        "captured": {"request": body(said, "application/json"), "answer": body(stream, "text/event-stream", truncated=True)},
        "not_captured": None,
    }
    code, out, err = invoke("requests", "r1", "--url", scripted.url)
    assert (code, err) == (0, "") and "\x1b" not in out and '    "Grüße \\u001b[31m"' in out
    assert "tokens       12 in, 34 out\n" in out and f"request: {len(said)} bytes, application/json\n" in out
    assert "text/event-stream, of which this is the beginning\n" in out and "  data: [DONE]\n" in out
    assert json.loads(invoke("requests", "r1", "-o", "json", "--url", scripted.url)[1])["captured"] == scripted.said["captured"]


def test_what_a_request_says_is_read_at_80_columns(
    invoke: Invoke, scripted: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    at_80_columns(monkeypatch)
    said = json.dumps({"messages": [{"role": "user", "content": "some words " * 60}]})
    asked = body(said, "application/json; charset=utf-8; profile=a-long-one", truncated=False)
    scripted.said = {"captured": {"request": asked, "answer": body("data: " + said, "text/event-stream")}, "not_captured": None}
    code, out, _ = invoke("requests", "r1", "--url", scripted.url)
    assert code == 0 and max(map(len, out.splitlines())) <= 80 and out.count("some words") > 100


def test_a_request_whose_bodies_are_not_there_says_why(invoke: Invoke, scripted: Scripted) -> None:
    code, out, _ = invoke("requests", "r1", "--url", scripted.url)
    assert code == 0 and "not captured  newer ones needed the room" in out
    scripted.said = {"captured": {"request": body(None, "multipart/form-data"), "answer": None}, "not_captured": None}
    _, out, _ = invoke("requests", "r1", "--url", scripted.url)
    assert out.endswith("request: 1 bytes, multipart/form-data, which is no text\n") and "not captured" not in out


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "c.yaml"
    pool = '{id: chat, engine: llamacpp, model: "file:m.gguf", aliases: [gpt]}'
    path.write_text(f"profile: dev\ngateway: {{keys_file: keys.json}}\npools: [{pool}]\n")
    return path


def test_keys_are_made_listed_and_removed(invoke: Invoke, config: Path) -> None:
    code, out, err = invoke("keys", "add", "laptop", "--model", "gpt", "--config", str(config))
    assert (code, err) == (0, "") and out.startswith("pm-")
    assert "laptop" in invoke("keys", "ls", "--config", str(config))[1]
    assert invoke("keys", "rm", "laptop", "--config", str(config))[0] == 0
    assert "there are no keys" in invoke("keys", "ls", "--config", str(config))[1]


@pytest.mark.parametrize("name", ["", " a", "a\nb", "\x1b[31m", "x" * 65])
def test_a_name_that_is_none_is_refused(invoke: Invoke, config: Path, name: str) -> None:
    code, _, err = invoke("keys", "add", name, "--config", str(config))
    assert code != 0 and "it must be 1 to 64" in err


def test_a_key_for_a_model_that_is_not_there_is_said(invoke: Invoke, config: Path) -> None:
    code, out, err = invoke("keys", "add", "a", "--model", "nosuch", "--config", str(config))
    assert code == 0 and out.startswith("pm-") and "no pool of the configuration is called 'nosuch'" in err


def test_keys_that_are_made_at_the_same_time_are_all_kept(tmp_path: Path) -> None:
    place = tmp_path / "keys.json"
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda number: KeyFile(place).add(f"k{number}"), range(24)))
    assert len(KeyFile(place).all()) == 24
