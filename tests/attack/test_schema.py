"""Every operation of the OpenAPI document, fed with what the document allows and with what it forbids (FAULTS H13).

A real daemon with a real process behind pool ``p``, with a token and without. Nothing may end in a fault of the daemon's own,
every answer must be one that the document announces, and what follows an answer (its links) must be found.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from schemathesis import Case, CheckContext, Response
from schemathesis.specs.openapi import checks

from pool_managerd.api.openapi import document
from tests.system.daemons import Daemon

TOKEN = "a-token-of-more-than-32-characters-0123456789"
EXAMPLES = int(os.environ.get("POOL_MANAGERD_ATTACK_EXAMPLES", "6"))
BY_DESIGN = {500: {"PRELOAD_FAILED", "STOP_FAILED"}, 507: {"STATE_UNWRITABLE"}}
ENDLESS = r"/(events|logs)$"
CHECKS = [
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
    checks.response_headers_conformance,
]
STRICT = [*CHECKS, checks.negative_data_rejection]  # fmt: skip
SETTINGS = settings(
    max_examples=EXAMPLES, deadline=None, derandomize=True, database=None, phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)  # fmt: skip


def no_fault_of_our_own(ctx: CheckContext, response: Response, case: Case[Any]) -> None:
    """What answers with more than 499 does so by design."""
    if response.status_code < 500 or (case.path.endswith("/ready") and response.status_code == 503):
        return
    code = response.json()["code"]
    expected = BY_DESIGN.get(response.status_code, {code} if response.status_code == 503 else set())
    assert code != "INTERNAL" and code in expected, (case.as_curl_command(), response.text)


class Attacked:
    """The daemon, and how a case is sent to it."""

    def __init__(self, daemon: Daemon) -> None:
        self.daemon = daemon
        self.base_url = f"http://127.0.0.1:{daemon.port}"
        self.session = requests.Session()
        self.session.trust_env = False

    def send(self, case: Case[Any]) -> Response:
        if self.daemon.token:
            self.session.headers["Authorization"] = f"Bearer {self.daemon.token}"
        if isinstance(case.body, dict) and "pool_id" in case.body and isinstance(case.body["pool_id"], str):
            case.body["pool_id"] = (case.path_parameters or {})["pool_id"]  # anything else is refused, and nothing more is seen
        return case.call(base_url=self.base_url, session=self.session, timeout=20)

    def revive(self) -> None:
        """Pool p is ready again, whatever was done to it."""
        status, health = self.daemon.get("/v1/pools/p/health")
        if status == 200 and health["ready"]:
            return
        for change in ("release", "undrain", "circuit/reset", "stop"):
            self.daemon.post(f"/v1/pools/p/{change}?wait=true")
        self.daemon.preload("p", slots_total=4)

    def renew(self) -> None:
        """Pool p is ready and without leases, and there is no other."""
        for pool in self.daemon.get("/v1/pools")[1]:
            if pool["pool_id"] != "p":
                self.daemon.delete(f"/v1/pools/{pool['pool_id']}")
        self.revive()
        for lease in self.daemon.get("/v1/pools/p/leases")[1]:
            self.daemon.delete(f"/v1/pools/p/leases/{lease['lease_id']}")

    def still_well(self) -> None:
        assert self.daemon.process is not None and self.daemon.process.poll() is None
        assert self.daemon.get("/health")[0] == 200
        assert not self.daemon.lines("internal_error") and "Traceback" not in self.daemon.text()


@pytest.fixture(scope="module", params=["with a token", "without"])
def attacked(request: pytest.FixtureRequest, session_dir: Path, closed_to_engines: str | None) -> Iterator[Attacked]:
    if closed_to_engines:
        pytest.skip(closed_to_engines)
    token = TOKEN if request.param == "with a token" else None
    daemon = Daemon(session_dir / request.param.replace(" ", "-"), **({"AUTH_TOKEN": token} if token else {}))
    daemon.token = token
    try:
        daemon.start()
        found = Attacked(daemon)
        with found.session:
            yield found
        found.still_well()
    finally:
        daemon.end()


SCHEMA = schemathesis.openapi.from_dict(document())
# The operations under /v1 and the bare ones; /v2 is the same table.
ONCE = SCHEMA.include(path_regex=r"^/(v1/|health|ready|metrics)").exclude(path_regex=ENDLESS)


@ONCE.parametrize()
@SETTINGS
def test_every_operation_answers_as_it_is_documented(case: Case[Any], attacked: Attacked) -> None:
    case.validate_response(attacked.send(case), checks=[no_fault_of_our_own, *STRICT])
    if "pool_id" in (case.path_parameters or {}) and case.operation.label != "DELETE /v1/pools/{pool_id}":
        if "leases" in case.path:
            attacked.revive()
        case.path_parameters["pool_id"] = "p"
        query: dict[str, Any] = case.query or {}
        case.query = {name: value for name, value in query.items() if name != "wait" or value in (False, "false")}
        case.validate_response(attacked.send(case), checks=[no_fault_of_our_own, *CHECKS])


def test_what_an_answer_links_to_is_there(attacked: Attacked) -> None:
    """Leases are taken, renewed and released, operations looked up, pools registered and deregistered, in any order."""
    attacked.revive()
    linked = SCHEMA.include(path_regex=r"^/v1/(operations|pools)").exclude(path_regex=ENDLESS)

    class Conversation(linked.as_state_machine()):  # type: ignore[misc]
        def setup(self) -> None:
            attacked.renew()  # each conversation begins alike: the same words get the same answers

        def call(self, case: Case[Any], **_: Any) -> Response:
            if case.method.upper() == "POST" and case.path.endswith("/leases"):
                attacked.revive()
                case.path_parameters["pool_id"] = "p"
            return attacked.send(case)

        def validate_response(self, response: Response, case: Case[Any], **_: Any) -> None:
            case.validate_response(response, checks=[no_fault_of_our_own, *CHECKS, checks.use_after_free])

    Conversation.run(settings=settings(SETTINGS, max_examples=2 * EXAMPLES, stateful_step_count=8))
