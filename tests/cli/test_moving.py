"""``import``: where its output goes, what it exits with, what it never writes over."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from pool_managerd.cli.table import width
from tests.cli.test_commands import Invoke

CLEAN = "models:\n  a: {cmd: /opt/llama-server -m /m/a.gguf}\n"
LOSSY = f"store: {{path: /x}}\n{CLEAN}"
SWAP = ("import", "llama-swap", "swap.yaml")


@pytest.fixture
def swap(invoke: Invoke) -> Path:
    """The file in the current directory, which is the test's own."""
    path = Path("swap.yaml")
    path.write_text(LOSSY)
    return path


def test_the_yaml_goes_to_stdout_and_the_report_to_stderr(invoke: Invoke, swap: Path) -> None:
    code, out, err = invoke(*SWAP)
    assert code == 1
    assert out.startswith("# From swap.yaml") and "id: a" in out
    assert "store" in err and "dropped" in err and "1 dropped" in err


def test_exits_0_when_nothing_was_dropped(invoke: Invoke, swap: Path) -> None:
    swap.write_text(CLEAN)
    assert invoke(*SWAP)[0] == 0


def test_what_was_written_passes_our_own_check(invoke: Invoke, swap: Path) -> None:
    code, out, err = invoke(*SWAP, "--out", "ours.yaml")
    assert (code, out) == (1, "") and "written to ours.yaml" in err and "config check --deep ours.yaml" in err
    assert invoke("config", "check", "ours.yaml")[0] == 0


def test_a_file_that_is_there_stays_unless_forced(invoke: Invoke, swap: Path) -> None:
    Path("ours.yaml").write_text("mine")
    code, out, err = invoke(*SWAP, "--out", "ours.yaml")
    assert (code, out) == (2, "") and "cannot write ours.yaml: it is there already" in err
    assert Path("ours.yaml").read_text() == "mine"
    assert invoke(*SWAP, "--out", "ours.yaml", "--force")[0] == 1
    assert Path("ours.yaml").read_text().startswith("# From")


def test_a_place_that_cannot_be_written_is_told(invoke: Invoke, swap: Path) -> None:
    code, _, err = invoke(*SWAP, "--out", "nowhere/ours.yaml")
    assert code == 2 and "cannot write nowhere/ours.yaml: No such file or directory" in err


def test_json_has_all_of_it(invoke: Invoke, swap: Path) -> None:
    code, out, err = invoke(*SWAP, "-o", "json")
    answer = json.loads(out)
    assert (code, err, answer["dropped"], answer["out"]) == (1, "", 1, None)
    assert answer["yaml"].startswith("# From")
    assert answer["findings"][0] == {
        "line": 1, "key": "store", "outcome": "dropped", "to": None,
        "why": "what was asked is kept on no disk; let Prometheus keep the metrics",
    }  # fmt: skip
    assert "yaml" not in json.loads(invoke(*SWAP, "-o", "json", "--out", "ours.yaml")[1])


@pytest.mark.parametrize("text", ["a: [", "models: {}", "", "- a"])
def test_a_file_that_cannot_be_read_is_a_2(invoke: Invoke, swap: Path, text: str) -> None:
    swap.write_text(text)
    code, out, err = invoke(*SWAP)
    assert (code, out) == (2, "") and err.startswith("swap.yaml") and "cannot" in err


def test_no_file_and_a_large_one_are_a_2(invoke: Invoke, swap: Path) -> None:
    code, _, err = invoke("import", "llama-swap", "nothing.yaml")
    assert code == 2 and "nothing.yaml: cannot read it: No such file" in err
    with swap.open("w") as file:
        file.truncate(100 << 20)
    code, _, err = invoke(*SWAP)
    assert code == 2 and "it is larger than" in err


def test_variables_of_this_shell_are_in_it(invoke: Invoke, swap: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    swap.write_text(CLEAN.replace("/m/a", "${env.WHERE}/a"))
    monkeypatch.delenv("WHERE", raising=False)
    code, _, err = invoke(*SWAP)
    assert code == 2 and "swap.yaml:2: cannot expand ${env.WHERE}: the environment has no WHERE" in err
    monkeypatch.setenv("WHERE", "/srv")
    assert "file:/srv/a.gguf" in invoke(*SWAP)[1]


def test_the_report_fits_into_80_columns(invoke: Invoke, swap: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    name = "an-organisation/a-model-with-a-long-name-and-漢字:30b"
    flags = "-m /m/a.gguf --n-cpu-moe 20 --flash-attn on -ngl 99"
    swap.write_text(json.dumps({"models": {name: {"cmd": f"/opt/a/long/path/to/llama-server {flags}", "ttl": 5, "name": "x"}}}))
    _, _, err = invoke(*SWAP)
    assert max(map(width, err.splitlines())) <= 80
    assert "GPU-only" in err and "\x1b" not in err


PRESETS = "[*]\napi-key = sk-123456789\n[a]\nmodel = /m/a.gguf\nnew-flag = on\n"
IMPORT = ("import", "llama-cpp-presets", "presets.ini")


def test_presets_of_llama_cpp_are_moved_over_and_pass_our_own_check(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    Path("presets.ini").write_text(PRESETS)
    code, out, err = invoke(*IMPORT, "--out", "ours.yaml")
    assert (code, out) == (1, "") and "[a] new-flag" in err and "PATH" in err and "2 dropped; written to ours.yaml" in err
    assert "123456789" not in err + Path("ours.yaml").read_text()
    assert invoke("config", "check", "ours.yaml")[0] == 0
    assert invoke(*IMPORT)[1] == Path("ours.yaml").read_text()


def test_presets_of_a_real_engine_and_model_are_accepted_as_they_are(
    invoke: Invoke, monkeypatch: pytest.MonkeyPatch, llama_server: Path, smol_model: Path
) -> None:
    monkeypatch.setenv("PATH", str(llama_server.parent))
    Path("presets.ini").write_text(f"version = 1\n[*]\nc = 512\n[org/smol:Q4_1]\nmodel = {smol_model}\nload-on-startup = true\n")
    assert invoke(*IMPORT, "--out", "ours.yaml")[0] == 0
    code, out, err = invoke("config", "check", "ours.yaml", "-o", "json")
    assert code == 0 and json.loads(out)["ok"] and "warn" not in err
    assert f"path: {llama_server}" in Path("ours.yaml").read_text()


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (None, "presets.ini: cannot read it: No such file"),
        (b"\x7fELF\x02\x01\x01\x00\xff", "presets.ini: cannot read it: byte 8 is not UTF-8"),
        (b"\x00" * 9, "presets.ini:1:1: cannot read it: it holds NUL"),
        (b"models: {}\n", "presets.ini:1:1: cannot read 'models' …"),
        (b" " * ((1 << 20) + 1), "presets.ini: cannot read it: it is larger than"),
    ],
)
def test_what_are_no_presets_is_a_2(invoke: Invoke, data: bytes | None, said: str) -> None:
    if data is not None:
        Path("presets.ini").write_bytes(data)
    code, out, err = invoke(*IMPORT)
    assert (code, out) == (2, "") and err.startswith(said)
