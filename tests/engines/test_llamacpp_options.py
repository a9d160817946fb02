"""A binary's options and version are its own words."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from pool_managerd.engines import programs
from pool_managerd.engines.flags import Option
from pool_managerd.engines.llamacpp.options import ServerBinaries, parse_help, recorded_options
from tests.conftest import confined

HELP = """\
----- common params -----

-h,    --help, --usage                  print usage and exit
-t,    --threads N                      number of CPU threads to use during generation (default: -1)
                                        (env: LLAMA_ARG_THREADS)
-fa,   --flash-attn [on|off|auto]       set Flash Attention use ('on', 'off', or 'auto', default: 'auto')
-kvo,  --kv-offload, -nkvo, --no-kv-offload
                                        whether to enable KV cache offloading (default: enabled)
--repack, -nr, --no-repack              whether to enable weight repacking (default: enabled)
--no-host                               bypass host buffer allowing extra buffers to be used
--control-vector-layer-range START END
                                        layer range to apply the control vector(s) to, start and end inclusive
-ot,   --override-tensor <tensor name pattern>=<buffer type>,...
                                        override tensor buffer type
-cms,  --checkpoint-min-step N          minimum spacing between context checkpoints in tokens (default: 8192,
--spec-draft-ngl, -ngld, --gpu-layers-draft, --n-gpu-layers-draft N
                                        max. number of draft model layers to store in VRAM, either an exact
                                        - none: use one GPU only
--draft, --draft-n, --draft-max N       the argument has been removed. use --spec-draft-n-max or
"""


def options_to_json(options: Sequence[Option]) -> str:
    """The compact form kept in ``data/``: one line per option."""
    rows = [json.dumps([list(option.names), list(option.negated), option.values]) for option in options]
    return "[\n" + ",\n".join(rows) + "\n]\n"


def asked() -> ServerBinaries:
    return ServerBinaries(programs.ProgramProbe(confined()))


def script(folder: Path, body: str) -> Path:
    path = folder / "engine"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def test_names_negations_and_values_are_read_from_the_help_text() -> None:
    assert parse_help(HELP) == (
        Option(("-h", "--help", "--usage"), (), 0),
        Option(("-t", "--threads"), (), 1),
        Option(("-fa", "--flash-attn"), (), 1),
        Option(("-kvo", "--kv-offload"), ("-nkvo", "--no-kv-offload"), 0),
        Option(("--repack",), ("-nr", "--no-repack"), 0),
        Option(("--no-host",), (), 0),
        Option(("--control-vector-layer-range",), (), 2),
        Option(("-ot", "--override-tensor"), (), 1),
        Option(("-cms", "--checkpoint-min-step"), (), 1),
        Option(("--spec-draft-ngl", "-ngld", "--gpu-layers-draft", "--n-gpu-layers-draft"), (), 1),
    )


def test_a_real_binary_tells_its_options_and_its_version(llama_server: Path, engines_run: None) -> None:
    facts = asked().facts(llama_server)
    assert facts.warnings == ()
    assert facts.version.startswith("llamacpp-b")
    assert {"--model", "--host", "--port", "--parallel", "--ctx-size", "--n-gpu-layers", "--metrics"} <= {
        option.canonical for option in facts.options.options
    }


def test_the_recorded_options_are_those_of_the_pinned_binary(llama_server: Path) -> None:
    facts = asked().facts(llama_server)
    if facts.version != "llamacpp-b1-571d0d5":
        pytest.skip(f"another llama-server is used: {facts.version}")
    assert options_to_json(recorded_options().options) == options_to_json(facts.options.options)


def test_a_binary_is_asked_once_until_it_changes(open_dir: Path) -> None:
    count = open_dir / "count"
    count.touch()
    count.chmod(0o666)
    binary = script(open_dir, f"echo asked >> {count}")
    probe = asked()
    first = probe.facts(binary)
    assert probe.facts(binary) is first
    assert count.read_text().count("asked") == 2
    script(open_dir, f"echo asked again >> {count}")
    probe.facts(binary)
    assert count.read_text().count("asked") == 4


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("exit 3", "--help exited with code 3"),
        ("kill -ILL $$", "--help was ended by signal 4"),
        ("exit 0", "--help lists no options"),
    ],
)
def test_a_silent_binary_costs_warnings_only(open_dir: Path, body: str, words: str) -> None:
    facts = asked().facts(script(open_dir, body))
    assert words in facts.warnings[0]
    assert facts.version == "unknown"
    assert len(facts.warnings) == 2
    assert "--model" in facts.options


def test_a_binary_that_hangs_or_babbles_is_ended_at_its_bound(open_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "PROBE_TIMEOUT_S", 0.3)
    began = time.monotonic()
    facts = asked().facts(script(open_dir, "sleep 60"))
    assert "gave no answer within 0.3 s" in facts.warnings[0]
    facts = asked().facts(script(open_dir, "while :; do echo babble babble babble babble babble babble; done"))
    assert "--help" in facts.warnings[0]
    assert time.monotonic() - began < 10


def test_a_binary_is_asked_without_the_daemons_secrets(open_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTH_TOKEN", "hunter2")
    seen = open_dir / "seen"
    seen.touch()
    seen.chmod(0o666)
    asked().facts(script(open_dir, f"env >> {seen}; id -u >> {seen}"))
    assert "hunter2" not in seen.read_text()
    assert "PATH=" in seen.read_text()


def test_a_binary_with_an_old_date_is_asked_again_all_the_same(open_dir: Path) -> None:
    binary = script(open_dir, "echo one")
    before = binary.stat()
    probe = asked()
    first = probe.facts(binary)
    binary.write_text(binary.read_text().replace("one", "two"))
    os.utime(binary, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert probe.facts(binary) is not first


def test_without_somebody_to_run_it_a_binary_is_not_run(open_dir: Path) -> None:
    facts = ServerBinaries(programs.ProgramProbe()).facts(script(open_dir, f"touch {open_dir}/ran"))
    assert "was not asked" in facts.warnings[0]
    assert "--model" in facts.options
    assert not (open_dir / "ran").exists()
