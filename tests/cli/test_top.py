"""The command in pipes: one picture, or one after the other; what it asks, and what it makes of those who do not answer."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from pool_managerd.core.event import Event
from pool_managerd.errors import RequestError
from tests.cli.test_commands import Invoke, Server
from tests.cli.test_printing import COMMAND
from tests.cli.top_nodes import Gateway
from tests.cli.top_samples import ticket
from tests.conftest import free_port

NOWHERE = "http://127.0.0.1:1"


def shell(text: str) -> tuple[int, str]:
    done = subprocess.run(
        ["/bin/bash", "-c", f"set -o pipefail; {text}"], capture_output=True, text=True, timeout=50, check=False
    )
    return done.returncode, done.stdout


def test_a_pipe_gets_one_picture(invoke: Invoke, node: Server, gateway: Gateway) -> None:
    code, out, err = invoke("top", "--gateway-url", gateway.url)
    assert (code, err) == (0, "")
    head, _, *rest = out.splitlines()
    assert "pool-managerd 0.1.0  1/1 pools ready  1 in flight  0 waiting  - tok/s" in head and node.served.url in head
    assert [line[:5] for line in rest if line.startswith("GPU")] == ["GPU  ", "GPU 0", "GPU 1"] and rest[-1].startswith(
        "demo ready"
    )
    assert gateway.asked == 1


def test_each_thing_is_asked_for_once(invoke: Invoke, node: Server, gateway: Gateway) -> None:
    asked: list[str] = []

    def noted(name: str, answer: Any) -> Any:
        def ask() -> Any:
            asked.append(name)
            return answer

        return ask

    fake: Any = node.node
    fake.queue, fake.yields = noted("queue", []), noted("yields", [])
    fake.statuses, fake.devices = noted("statuses", []), noted("devices", fake.answer)
    code, out, _ = invoke("top", "--once", "--gateway-url", gateway.url)
    assert (code, sorted(asked)) == (0, ["devices", "queue", "statuses", "yields"]) and "no pools" in out


def test_machines_get_an_object_a_line_with_rates_from_the_second_on(node: Server, gateway: Gateway) -> None:
    url = f"--url {node.served.url} --gateway-url {gateway.url}"
    code, out = shell(f"{COMMAND} top -o json --interval 0.2 {url} | head -3")
    assert code == 141
    first, *later = map(json.loads, out.splitlines())
    assert len(later) == 2 and first["totals"]["tokens_per_s"] is None
    for found in later:
        (row,) = found["pools"]
        assert row["first_token_ms"] == 182 and row["tokens_per_s"] == pytest.approx(100 * row["requests_per_s"]) and row["busy"]
        assert found["totals"]["in_flight"] == 1 and found["totals"]["tokens_per_s"] == row["tokens_per_s"] > 0


def test_a_pipe_gets_one_picture_after_the_other_with_an_interval(node: Server) -> None:
    code, out = shell(f"{COMMAND} top --interval 200ms --url {node.served.url} --gateway-url {NOWHERE} | head -40")
    assert code == 141 and out.count("pools ready") > 2 and "\x1b" not in out


def test_who_waits_and_the_last_error_are_shown(invoke: Invoke, node: Server) -> None:
    fake: Any = node.node
    fake.queue = lambda: [ticket(1, pool_id="demo")]
    events: list[tuple[str, str]] = [("error", "It fell"), ("info", "It stood up"), ("warn", "It may fall")]
    now = round(time.time() * 1000)
    for number, (level, human) in enumerate(events, 1):
        fake.events.log.append(Event(number, now, "notice", level, "demo", human))
    out = invoke("top", "--gateway-url", NOWHERE)[1]
    assert "error demo: It fell" in out and "It may fall" not in out
    assert "a slot: 4 leases are held" in out and "1 waiting" in out


def test_without_a_gateway_there_are_no_rates(invoke: Invoke, node: Server) -> None:
    code, out, err = invoke("top", "--gateway-url", NOWHERE)
    assert (code, err) == (0, "")
    assert f"no rates: cannot reach the gateway at {NOWHERE}" in out
    assert json.loads(invoke("top", "-o", "json", "--gateway-url", NOWHERE)[1])["gateway"]["problem"]


def test_what_is_not_for_this_user_is_left_out(invoke: Invoke, node: Server) -> None:
    def refused() -> Any:
        raise RequestError("not for you", code="UNAUTHORIZED", status=401)

    fake: Any = node.node
    fake.queue = fake.yields = refused
    code, out, _ = invoke("top", "-o", "json", "--gateway-url", NOWHERE)
    assert code == 0 and json.loads(out)["queue"] is None


def test_a_daemon_that_was_never_there_is_an_error(invoke: Invoke) -> None:
    code, out, err = invoke("top", "--url", f"http://127.0.0.1:{free_port()}", "--gateway-url", NOWHERE)
    assert (code, out) == (3, "") and "cannot reach the daemon" in err


def test_something_else_than_a_daemon_is_an_error(invoke: Invoke, gateway: Gateway) -> None:
    code, _, err = invoke("top", "--url", gateway.url, "--gateway-url", gateway.url)
    assert code == 4 and "404" in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--interval", "0.1"), "it must be 0.2s to 60s"),
        (("--interval", "2m"), "it must be 0.2s to 60s"),
        (("--interval", "nan"), "it is no length of time"),
        (("--interval", "1", "--once"), "cannot use --once and --interval together"),
        (("--gateway-url", "nowhere"), "as the gateway's URL"),
    ],
)
def test_what_cannot_be_meant_is_refused(invoke: Invoke, arguments: tuple[str, ...], said: str) -> None:
    code, _, err = invoke("top", *arguments)
    assert code == 2 and said in err


def test_a_configuration_with_mistakes_elsewhere_costs_the_rates_alone(invoke: Invoke, node: Server, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(f'daemon: {{bind: "127.0.0.1:{node.served.port}"}}\nnonsense: 1\n')
    code, out, _ = invoke("top", "--config", str(tmp_path / "c.yaml"))
    assert code == 0 and "no rates: " in out and "nonsense" in out and "demo ready" in out


def test_the_gateway_of_a_daemon_elsewhere_is_looked_for_there(monkeypatch: pytest.MonkeyPatch) -> None:
    from pool_managerd.cli.client import Daemon
    from pool_managerd.cli.gateway_client import GatewayClient
    from pool_managerd.cli.top import gateway_of

    monkeypatch.delenv("POOL_MANAGERD_GATEWAY_URL", raising=False)
    for url, found in (("http://gpu-7:9200", "http://gpu-7:8088"), ("http://[2001:db8::1]:9", "http://[2001:db8::1]:8088")):
        client = gateway_of(None, Daemon(url), None)
        assert isinstance(client, GatewayClient) and client.url == found
    monkeypatch.setenv("POOL_MANAGERD_GATEWAY_URL", "http://other:1")
    client = gateway_of(None, Daemon("http://gpu-7:9200"), None)
    assert isinstance(client, GatewayClient) and client.url == "http://other:1"
