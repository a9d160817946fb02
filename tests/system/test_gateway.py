"""The front door with real engines: the clients that people use, and a daemon, a gateway and an engine that are killed."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest

from tests.conftest import free_port, wait_until
from tests.system.daemons import Daemon

SYSTEM = "You are a helpful assistant."
QUESTION: Any = [{"role": "user", "content": "What is the capital of France?"}]
ASKED: Any = [{"role": "system", "content": SYSTEM}, *QUESTION]
SURE = {"temperature": 0}
LONG: Any = [{"role": "user", "content": "Write a very long story about a dog and a cat."}]


class Home(Daemon):
    """A daemon with a gateway, and one real model that is not loaded; ``others`` are the same model under these ids."""

    def __init__(
        self, folder: Path, model: Path, others: tuple[str, ...] = (), sections: str = "", gateway: str = "", **pool: Any
    ) -> None:
        self.gateway_port = free_port()
        provisioning = {"mode": "package", "flags": ["--threads", "1"]}
        smol = {
            "id": "smol", "engine": "llamacpp", "model": f"file:{model}", "ctx": 2048, "slots": 2, "preload": False,
            "aliases": ["gpt-4o"], "provisioning": provisioning, **pool,
        }  # fmt: skip
        pools = json.dumps([smol, *({**smol, "id": name, "aliases": []} for name in others)])
        super().__init__(folder, f'gateway: {{bind: "127.0.0.1:{self.gateway_port}"{gateway}}}\npools: {pools}\n{sections}')

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.gateway_port}"

    def gateway_pid(self) -> int:
        return int(json.loads((self.run / "gateway.json").read_text())["pid"])

    def start(self, **how: Any) -> Home:
        super().start(**how)
        wait_until(self.follows, "the gateway to follow the daemon", 15)
        return self

    def follows(self) -> bool:
        try:
            return bool(self.ask("GET", "/health")[1]["daemon"] == "connected")
        except OSError:
            return False

    def ask(self, method: str, path: str, body: Any = None, key: str | None = None) -> tuple[int, Any]:
        """One request to the gateway, with its decoded answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.gateway_port, timeout=60)
        try:
            headers = {} if key is None else {"Authorization": f"Bearer {key}"}
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())
        finally:
            connection.close()

    def tokens(self, count: int) -> Iterator[bytes]:
        """The events of a long stream, as they come."""
        connection = http.client.HTTPConnection("127.0.0.1", self.gateway_port, timeout=60)
        body = {"model": "smol", "messages": LONG, "stream": True, "max_tokens": count, "ignore_eos": True}
        connection.request("POST", "/v1/chat/completions", json.dumps(body))
        answer = connection.getresponse()
        assert answer.status == 200
        try:
            while line := answer.readline():
                if line.startswith(b"data: "):
                    yield line.removeprefix(b"data: ").strip()
        finally:
            connection.close()


@pytest.fixture
def home(open_dir: Path, smol_model: Path) -> Iterator[Home]:
    made = Home(open_dir / "home", smol_model)
    yield made
    made.end()


def test_the_clients_that_people_use_talk_to_a_model_that_was_not_loaded(home: Home) -> None:
    home.start()
    chat = openai.OpenAI(base_url=f"{home.url}/v1", api_key="none", max_retries=0, timeout=60)
    answer = chat.chat.completions.create(model="gpt-4o", messages=ASKED, max_tokens=16, temperature=0)
    assert "Paris" in str(answer.choices[0].message.content)
    assert answer.model in ("smol", "gpt-4o"), "no path of this machine"
    streamed = chat.chat.completions.create(model="smol", messages=ASKED, max_tokens=16, temperature=0, stream=True)
    assert "Paris" in "".join(str(chunk.choices[0].delta.content or "") for chunk in streamed if chunk.choices)
    assert [model.id for model in chat.models.list()] == ["smol"] and chat.models.retrieve("gpt-4o").id == "smol"
    with pytest.raises(openai.NotFoundError, match="models here: gpt-4o, smol"):
        chat.chat.completions.create(model="gpt-5", messages=ASKED)
    claude = anthropic.Anthropic(base_url=home.url, api_key="none", max_retries=0, timeout=60)
    message = claude.messages.create(model="smol", system=SYSTEM, messages=QUESTION, max_tokens=16, extra_body=SURE)
    assert "Paris" in str(message.content)
    with claude.messages.stream(model="smol", system=SYSTEM, messages=QUESTION, max_tokens=16, extra_body=SURE) as stream:
        assert "Paris" in "".join(stream.text_stream)
    assert claude.messages.count_tokens(model="smol", messages=QUESTION).input_tokens > 5
    with pytest.raises(anthropic.NotFoundError, match="models here"):
        claude.messages.create(model="opus", messages=QUESTION, max_tokens=4)
    assert len(home.lines("spawn")) == 1
    rows = home.ask("GET", "/v1/requests")[1]
    assert rows[0]["tokens_out"] > 1 and rows[0]["queued_ms"] > 50 and rows[-1]["state"] == "failed"


def test_a_daemon_that_is_killed_drops_no_stream_and_the_next_one_takes_the_gateway_over(home: Home) -> None:
    home.start()
    stream = home.tokens(200)
    next(stream)
    pid = home.gateway_pid()
    home.kill()
    next(stream)
    home.start()
    assert home.gateway_pid() == pid and len(home.lines("gateway_taken_over")) == 1
    rest = list(stream)
    assert rest[-1] == b"[DONE]" and len(rest) > 150
    wait_until(lambda: home.status("smol")["active_leases"] == 0, "its lease to be back", 15)
    assert home.ask("POST", "/v1/completions", {"model": "smol", "prompt": "a", "max_tokens": 1})[0] == 200


def test_a_gateway_that_is_killed_holds_no_slot_and_comes_back(home: Home) -> None:
    home.start()
    stream = home.tokens(2000)
    next(stream)
    assert home.status("smol")["active_leases"] == 1
    pid = home.gateway_pid()
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: home.status("smol")["active_leases"] == 0, "its lease to be over", 5)
    wait_until(lambda: home.gateway_pid() != pid and home.follows(), "another one", 15)
    (ended,) = home.lines("gateway_ended")
    assert "was ended by signal 9" in ended["human"]
    assert home.ask("POST", "/v1/completions", {"model": "smol", "prompt": "a", "max_tokens": 1})[0] == 200


def test_an_engine_that_is_killed_in_the_middle_of_a_stream_is_named_in_it_and_comes_back(home: Home) -> None:
    home.start()
    stream = home.tokens(2000)
    next(stream)
    os.kill(home.status("smol")["pid"], signal.SIGKILL)
    last = json.loads(list(stream)[-1])
    assert last["error"]["code"] == "engine_gone" and "SIGKILL" in last["error"]["message"], last
    code, answer = home.ask("POST", "/v1/completions", {"model": "smol", "prompt": "a", "max_tokens": 1})
    assert code == 200, answer


def test_a_client_that_goes_away_frees_its_slot_at_once(home: Home) -> None:
    home.start()
    streams = [home.tokens(2000) for _ in range(2)]
    for stream in streams:
        next(stream)
    url = home.status("smol")["url"]
    for stream in streams:
        stream.close()  # type: ignore[attr-defined]

    def idle() -> bool:
        with urllib.request.urlopen(f"{url}/slots", timeout=10) as answer:
            return not any(slot["is_processing"] for slot in json.loads(answer.read()))

    wait_until(idle, "the engine to stop working", 10)
    assert home.ask("POST", "/v1/completions", {"model": "smol", "prompt": "a", "max_tokens": 1})[0] == 200


def test_many_clients_of_a_cold_model_are_one_start_and_all_are_served(home: Home) -> None:
    home.start()
    body = {"model": "smol", "prompt": "a", "max_tokens": 1}
    with ThreadPoolExecutor(40) as clients:
        codes = list(clients.map(lambda _: home.ask("POST", "/v1/completions", body)[0], range(40)))
    assert codes == [200] * 40 and len(home.lines("spawn")) == 1
    wait_until(lambda: home.status("smol")["active_leases"] == 0, "all leases to be back", 15)


def test_one_more_than_a_pool_may_have_is_refused_while_it_loads_and_served_when_there_is_room(
    open_dir: Path, smol_model: Path
) -> None:
    home = Home(open_dir / "home", smol_model, slots=1, requests={"concurrency": 2})
    home.start()
    try:
        body = {"model": "gpt-4o", "prompt": "a", "max_tokens": 4}
        with ThreadPoolExecutor(8) as clients:
            found = list(clients.map(lambda _: home.ask("POST", "/v1/completions", body), range(8)))
        codes = [answer["error"]["code"] for status, answer in found if status == 429]
        assert sorted(status for status, _ in found) == [200] * 2 + [429] * 6 and codes == ["concurrency_limit"] * 6
        assert home.ask("POST", "/v1/completions", body)[0] == 200 and len(home.lines("spawn")) == 1
    finally:
        home.end()


def test_what_was_said_is_read_where_it_is_captured(open_dir: Path, smol_model: Path) -> None:
    home = Home(open_dir / "home", smol_model, gateway=", capture_bytes: 8MiB")
    home.start()
    try:
        chat = openai.OpenAI(base_url=f"{home.url}/v1", api_key="sk-none", max_retries=0, timeout=60)
        streamed = chat.chat.completions.create(
            model="smol", messages=ASKED, max_tokens=16, temperature=0, stream=True, extra_headers={"x-request-id": "mine"}
        )
        said = "".join(str(chunk.choices[0].delta.content or "") for chunk in streamed if chunk.choices)
        row = home.ask("GET", "/v1/requests/mine")[1]
        assert json.loads(row["captured"]["request"]["text"])["messages"] == ASKED and "sk-none" not in str(row)
        events = [line[6:] for line in row["captured"]["answer"]["text"].splitlines() if line.startswith("data: {")]
        choices = [choice for event in events for choice in json.loads(event)["choices"]]
        assert "".join(choice["delta"].get("content") or "" for choice in choices) == said
        (line,) = home.lines("captures")
        assert "8 MiB of memory" in line["human"]
    finally:
        home.end()


def test_a_model_that_a_person_stopped_is_not_started_and_one_that_never_loads_says_why(home: Home, tmp_path: Path) -> None:
    home.start()
    home.post("/v1/pools/smol/stop?wait=true")
    chat = openai.OpenAI(base_url=f"{home.url}/v1", api_key="none", timeout=60)
    with pytest.raises(openai.APIStatusError, match="it was stopped by request"):
        chat.chat.completions.create(model="smol", messages=ASKED)
    assert home.lines("spawn") == [], "nobody asked again, either"


def test_it_ends_with_its_daemon(home: Home) -> None:
    home.start()
    pid = home.gateway_pid()
    assert home.terminate() == 0 and not Path(f"/proc/{pid}").exists() and not (home.run / "gateway.json").exists()


def test_off_loopback_it_asks_for_keys(open_dir: Path, smol_model: Path) -> None:
    home = Home(open_dir / "open", smol_model)
    home.config.write_text(home.config.read_text().replace(f'bind: "127.0.0.1:{home.gateway_port}"', 'bind: "0.0.0.0:0"'))
    process = home.launch()
    assert process.wait(15) != 0 and "without API keys" in home.text()


def test_models_of_a_group_take_turns_as_it_says(open_dir: Path, smol_model: Path) -> None:
    groups = json.dumps([{"id": "large", "pools": ["smol", "big"]}])
    home = Home(open_dir / "home", smol_model, ("big", "small"), f"together: {{groups: {groups}}}\n")
    home.start()
    try:
        for model, loaded in (("smol", {"smol"}), ("small", {"smol", "small"}), ("big", {"big", "small"})):
            body = {"model": model, "messages": QUESTION, "max_tokens": 2}
            assert home.ask("POST", "/v1/chat/completions", body)[0] == 200
            running = home.ask("GET", "/running")[1]["running"]
            assert {one["model"] for one in running} == loaded
    finally:
        home.end()


def test_a_gateway_whose_port_is_taken_says_so_and_comes_up_when_it_is_free(home: Home) -> None:
    with socket.create_server(("127.0.0.1", home.gateway_port)):
        super(Home, home).start()
        wait_until(lambda: bool(home.lines("gateway_ended")), "the end of the first try", 15)
        told = home.lines("gateway_ended")[0]
        assert "cannot listen on 127.0.0.1" in told["human"] and "in use" in told["last_error"] and told["exit_code"] == 1
    wait_until(home.follows, "the gateway to follow the daemon", 40)


@pytest.mark.slow
def test_an_engine_keeps_what_it_has_read_of_an_agents_prompt(open_dir: Path, smol_model: Path) -> None:
    home = Home(open_dir / "home", smol_model, slots=1, requests={"agent_friendly": True})
    home.start()
    manual = " ".join(f"Rule {number}: be kind to everybody." for number in range(40))

    def turns(url: str, rule: str) -> tuple[int, int]:
        """Tokens of the second request of an agent, and how many of them the engine had."""
        talk = [{"role": "user", "content": "Hello"}]
        used: Any = None
        for sign in ("fa690", "0b1c2"):
            told = f"x-anthropic-billing-header: cc_version=2.1.37.0d9; cc_entrypoint=cli; cch={sign};\n{rule} {manual}"
            body = {"model": "smol", "messages": [{"role": "system", "content": told}, *talk], "max_tokens": 4, **SURE}
            asked = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(body).encode())
            with urllib.request.urlopen(asked, timeout=60) as got:
                answer = json.load(got)
            used, said = answer["usage"], answer["choices"][0]["message"]["content"]
            talk += [{"role": "assistant", "content": said}, {"role": "user", "content": "Go on"}]
        return used["prompt_tokens"], used["prompt_tokens_details"]["cached_tokens"]

    try:
        home.post("/v1/pools/smol/start?wait=true")
        tokens, without = turns(home.status("smol")["url"], "Be brief.")
        assert without < 60 < 400 < tokens, "the engine itself has no rules, and its cache ends where the marker differs"
        tokens, cached = turns(home.url, "Be verbose.")
        assert tokens - cached < 60 and cached > 400, (tokens, cached)
    finally:
        home.end()
