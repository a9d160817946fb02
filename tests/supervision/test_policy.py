"""Which engines may be submitted, and with which environment."""

from __future__ import annotations

import pytest

from pool_managerd.config import Config
from pool_managerd.core.artifacts import PreparedEngine
from pool_managerd.errors import RequestError
from pool_managerd.supervision.policy import check_submission

BINARY = "/opt/llama-server"


def cloud(*variables: str) -> Config:
    return Config.model_validate({"profile": "cloud", "policy": {"engine_allowlist": (BINARY,), "engine_env": variables}})


def engine(binary: str = BINARY, **env: str) -> PreparedEngine:
    return PreparedEngine("p", binary, port=1, env=env)


@pytest.mark.parametrize(
    "name",
    ["LD_PRELOAD", "LD_LIBRARY_PATH", "LD_AUDIT", "PYTHONPATH", "PYTHONSTARTUP", "GCONV_PATH", "BASH_ENV", "ENV", "NODE_OPTIONS",
     "PATH", "HOME", "GLIBC_TUNABLES", "CUDA_INJECTION64_PATH", "NCCL_NET_PLUGIN", "GGML_BACKEND_PATH", "OMP_TOOL_LIBRARIES",
     "PERL5OPT", "RUBYOPT", "_JAVA_OPTIONS"],
)  # fmt: skip
def test_no_variable_makes_a_listed_binary_another_program(name: str) -> None:
    for config in (cloud(), cloud(name)):
        with pytest.raises(RequestError, match=name) as caught:
            check_submission(config, "p", engine(**{name: "x"}))
        assert caught.value.code == "POLICY_DENIED"


def test_in_cloud_variables_are_those_that_are_listed() -> None:
    check_submission(cloud(), "p", engine(HF_TOKEN="x", CUDA_VISIBLE_DEVICES="0", LLAMA_ARG_CTX_SIZE="1"))
    with pytest.raises(RequestError, match="MY_SETTING"):
        check_submission(cloud(), "p", engine(MY_SETTING="x"))
    check_submission(cloud("MY_SETTING"), "p", engine(MY_SETTING="x"))


def test_a_binary_that_is_not_listed_is_refused_in_cloud() -> None:
    for binary in ("/opt/other", "/opt/../opt/llama-server", "llama-server"):
        with pytest.raises(RequestError, match="cannot run a submitted engine"):
            check_submission(cloud(), "p", engine(binary))
