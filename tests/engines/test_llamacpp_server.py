"""The launcher of the embedded engine: llama-server's flags, clear refusals, a clean end."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pool_managerd.engines.llamacpp import server
from pool_managerd.engines.llamacpp.options import recorded_options
from pool_managerd.engines.llamacpp.server import OPTIONS, FlagError, apply_flags
from tests.conftest import free_port, http_status, wait_until

LAUNCHER = server.__file__
Run = Callable[[tuple[str, ...], dict[str, str]], subprocess.Popen[bytes]]


def run_to_end(*flags: str) -> tuple[int, str]:
    done = subprocess.run([sys.executable, "-I", LAUNCHER, *flags], capture_output=True, text=True, timeout=30, check=False)
    return done.returncode, done.stderr


def test_every_option_exists_in_the_package_and_is_named_as_in_llama_server() -> None:
    xllamacpp = pytest.importorskip("xllamacpp")
    params = xllamacpp.CommonParams()
    real = recorded_options()
    for option in OPTIONS:
        target: Any = params
        for part in option.attr.split("."):
            assert hasattr(target, part), option
            target = getattr(target, part)
        if option.names[-1] != "--require-gpu":
            known = [real.use(name).option for name in (*option.names, *option.negated)]
            assert len({found.canonical for found in known}) == 1, option
            assert known[0].values == option.values, option


def test_values_reach_the_parameters_they_name() -> None:
    xllamacpp = pytest.importorskip("xllamacpp")
    params = xllamacpp.CommonParams()
    flags = "-c 512 -np 2 -ngl all -t 3 -fa off -ctk q8_0 -ts 3,1 --temp 0.5 -a x,y --no-webui --no-kv-offload --metrics -fit off"
    assert apply_flags([*flags.split(), "--require-gpu"], params, xllamacpp) is True
    assert (params.n_ctx, params.n_parallel, params.n_gpu_layers, params.cpuparams.n_threads) == (512, 2, 999, 3)
    assert params.flash_attn_type == xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    assert params.cache_type_k == xllamacpp.ggml_type.GGML_TYPE_Q8_0
    assert params.tensor_split[:3] == [3.0, 1.0, 0.0]
    assert params.model_alias == {"x", "y"}
    assert (params.ui, params.no_kv_offload, params.endpoint_metrics, params.fit_params) == (False, True, True, False)
    assert apply_flags(["--kv-offload"], params, xllamacpp) is False
    assert params.no_kv_offload is False


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--modle", "x"], "unknown flag '--modle' \\(did you mean '--model'\\?\\)"),
        (["--port"], "the flag --port needs a value"),
        (["--port", "x"], "cannot use 'x' for --port"),
        (["--split-mode", "zigzag"], "it must be one of"),
        (["-fit", "maybe"], "it must be on or off"),
    ],
)
def test_a_flag_it_cannot_use_is_named(flags: list[str], message: str) -> None:
    module = SimpleNamespace(llama_split_mode=SimpleNamespace(LLAMA_SPLIT_MODE_LAYER=1))
    with pytest.raises(FlagError, match=message):
        apply_flags(flags, SimpleNamespace(), module)


def test_a_wrong_flag_ends_it_with_code_2_and_a_bad_start_with_code_1(tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    assert run_to_end("--nonsense")[0] == 2
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, text = run_to_end("--model", str(tmp_path / "none.gguf"), "--port", str(port))
    assert code == 1
    assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in text
    code, text = run_to_end("--model", str(tmp_path / "none.gguf"), "--port", str(free_port()))
    assert code == 1
    assert "cannot start the llama.cpp server" in text


def test_without_a_gpu_require_gpu_refuses() -> None:
    xllamacpp = pytest.importorskip("xllamacpp")
    cpu = xllamacpp.ggml_backend_dev_type.GGML_BACKEND_DEVICE_TYPE_CPU
    if any(device["type"] != cpu for device in xllamacpp.get_device_info()):
        pytest.skip("this machine has a GPU that the package can use")
    code, text = run_to_end("--require-gpu")
    assert code == 1
    assert "GPU-only enforcement: this build of llama.cpp sees no GPU" in text


def handles(pid: int, number: signal.Signals) -> bool:
    """True once the process has a handler for the signal (SigCgt of its status)."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    caught = next(int(line.split()[1], 16) for line in lines if line.startswith("SigCgt:"))
    return bool(caught >> (number - 1) & 1)


def test_it_serves_and_ends_with_code_0_within_a_second_of_sigterm(tiny_model: Path, run_engine: Run) -> None:
    pytest.importorskip("xllamacpp")
    port = free_port()
    flags = ("--model", str(tiny_model), "--port", str(port), "--parallel", "2", "--ctx-size", "256", "--metrics")
    process = run_engine((sys.executable, "-I", LAUNCHER, *flags), {})
    wait_until(lambda: http_status(f"http://127.0.0.1:{port}/health") == 200, "the embedded engine")
    assert http_status(f"http://127.0.0.1:{port}/metrics") == 200
    # It answers from threads of its own a moment before the interpreter goes on and handles signals.
    wait_until(lambda: handles(process.pid, signal.SIGTERM), "its signal handler")
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 0


def test_sigterm_while_the_model_loads_ends_it_at_once(smol_model: Path, run_engine: Run) -> None:
    pytest.importorskip("xllamacpp")
    port = free_port()
    process = run_engine((sys.executable, "-I", LAUNCHER, "--model", str(smol_model), "--port", str(port)), {})
    wait_until(lambda: http_status(f"http://127.0.0.1:{port}/health") == 503, "the loading answer")
    process.send_signal(signal.SIGTERM)
    assert process.wait(2) in (0, -signal.SIGTERM)


def test_every_alias_counts() -> None:
    xllamacpp = pytest.importorskip("xllamacpp")
    params = xllamacpp.CommonParams()
    apply_flags(["--alias", "a,b", "--alias", "c"], params, xllamacpp)
    assert set(params.model_alias) == {"a", "b", "c"}


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        ("ImportError('libgomp.so.1: cannot open shared object file: No such file or directory')",
         "a shared library is missing: libgomp.so.1; apt-get install libgomp1 (Debian, Ubuntu)"),
        ("ImportError('libcudart.so.12: cannot open shared object file: No such file or directory')", "the CUDA runtime"),
        ("ImportError('/x.so: undefined symbol: ggml_init')", "undefined symbol: ggml_init; it was built for another system"),
        ("ModuleNotFoundError(\"No module named 'xllamacpp'\", name='xllamacpp')", "pip install 'pool-managerd[llamacpp]'"),
    ],
)  # fmt: skip
def test_a_package_that_cannot_be_loaded_is_not_called_missing(tmp_path: Path, raised: str, said: str) -> None:
    (tmp_path / "xllamacpp.py").write_text(f"raise {raised}\n")
    begin = f"import sys, runpy; sys.path.insert(0, {str(tmp_path)!r}); runpy.run_path({str(LAUNCHER)!r}, run_name='__main__')"
    ended = subprocess.run([sys.executable, "-c", begin], capture_output=True, text=True, timeout=30, check=False)
    assert ended.returncode == 1 and said in ended.stderr
    assert ("pip install" in ended.stderr) == raised.startswith("ModuleNotFound"), "it is there"
