"""A launch as one value: complete, without secrets, and readable by versions before and after."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from pool_managerd.core.artifacts import PreparedEngine
from pool_managerd.core.instance_id import InstanceId
from pool_managerd.core.launch_record import MAX_ARGV_BYTES, FileStamp, LaunchRecord, argv_digest, env_digest, record_of
from pool_managerd.core.slot_cache import SlotSaving

ENGINE = PreparedEngine(
    "p", "/bin/engine", ("--port", "8080", "--api-key", "hunter22"), port=8080, model_path="/m.gguf", model_id="file:m.gguf",
    engine_version="b1", slots_total=4, replica_id="r1", device_uuids=("GPU-1",), env={"HF_TOKEN": "hf_secret", "LANG": "C"},
)  # fmt: skip


def record(engine: PreparedEngine = ENGINE) -> LaunchRecord:
    return record_of(engine, epoch=7, reserved_bytes={"GPU-1": 5 << 30}, log_mark={11: 12}, decided_at_ms=1, order_at_ms=2)


def test_it_survives_json_and_what_a_later_version_adds() -> None:
    written = json.loads(json.dumps(record().to_json()))
    assert LaunchRecord.from_json({**written, "of a later version": {"x": 1}}) == record()
    assert record().instance == InstanceId("p", "r1") and record().log_mark == {11: 12}
    bare = record(PreparedEngine("p", "/bin/engine"))
    assert LaunchRecord.from_json(json.loads(json.dumps(bare.to_json()))) == bare


def test_an_adopted_engine_keeps_its_slots_where_it_did_before() -> None:
    engine = replace(ENGINE, slots=SlotSaving("/run/cache/p/slots", {"model": "m", "context": "4096"}))
    written = LaunchRecord.from_json(json.loads(json.dumps(record(engine).to_json())))
    assert written.engine_as_shown().slots == engine.slots and written.engine_as_shown().keeps_slots
    unable = record(replace(ENGINE, slots=SlotSaving(unable="it cannot")))
    assert not unable.engine_as_shown().keeps_slots
    before = {key: value for key, value in record().to_json().items() if key != "slots"}
    assert not LaunchRecord.from_json(before).engine_as_shown().keeps_slots, "as an earlier release wrote it"


def test_secrets_are_in_its_digests_alone() -> None:
    text = json.dumps(record().to_json())
    assert "hunter22" not in text and "hf_secret" not in text and "HF_TOKEN" not in text
    assert record().argv == ("/bin/engine", "--port", "8080", "--api-key", "***")
    others = [replace(ENGINE, flags=(*ENGINE.flags[:3], "hunter23")), replace(ENGINE, flags=("--port 8080", *ENGINE.flags[2:]))]
    assert len({argv_digest(engine.argv) for engine in (ENGINE, *others)}) == 3
    assert env_digest({"B": "2", "A": "1"}) == env_digest({"A": "1", "B": "2"}) != env_digest({"A": "1", "B": "3"})


def test_the_engine_that_it_shows_is_the_one_that_was_launched_but_for_its_secrets() -> None:
    engine = replace(ENGINE, device_mask="0", ctx=4096, verbatim=True, warmup="rerank", provisioning_mode="binary",
                     health_path="/ready", host="::1", engine="vllm")  # fmt: skip
    shown = record(engine).engine_as_shown()
    assert shown == replace(engine, flags=("--port", "8080", "--api-key", "***"), env={})
    assert replace(record(), argv=(), warmup="of a later version").engine_as_shown() == replace(
        ENGINE, binary_path="", flags=(), env={}, warmup="none"
    )


def test_the_files_and_the_share_of_a_launch_are_kept_and_a_stamp_of_another_version_is_left_out() -> None:
    stamp = FileStamp("/m.gguf", 1, 2, 3, 4)
    kept = record_of(
        ENGINE, epoch=7, reserved_bytes={}, log_mark={}, decided_at_ms=1, order_at_ms=2, exclusive=True, files=(stamp,)
    )
    written = json.loads(json.dumps(kept.to_json()))
    assert LaunchRecord.from_json(written) == kept and kept.files == (stamp,) and kept.exclusive
    assert LaunchRecord.from_json({**written, "files": [{"path": "/x"}, *written["files"]]}) == kept
    assert LaunchRecord.from_json({**written, "files": None}).files == ()


@pytest.mark.parametrize("word", ["x" * 500, "\N{GRINNING FACE}" * 500])
def test_it_stays_small_however_long_the_command_line_is(word: str) -> None:
    long = record(replace(ENGINE, flags=(word,) * 1_000))
    assert len(json.dumps(long.to_json())) < MAX_ARGV_BYTES + 2_000 and long.argv[0] == "/bin/engine"
    assert long.argv_digest == argv_digest(("/bin/engine", *(word,) * 1_000))


@pytest.mark.parametrize(
    "wrong",
    [
        {"schema_version": 2}, {"schema_version": None}, {"epoch": "7"}, {"epoch": True}, {"argv": "words"}, {"argv": [1]},
        {"model_id": 5}, {"reserved_bytes": {"GPU-1": "x"}}, {"log_mark": {"x": 1}}, {"url": None}, {"device_uuids": None},
    ],
)  # fmt: skip
def test_what_is_not_understood_is_refused(wrong: dict[str, Any]) -> None:
    (key,) = wrong
    named = "of version 2: this one knows 1" if wrong == {"schema_version": 2} else f"its {key} is missing or of another type"
    with pytest.raises(ValueError, match=f"cannot use a launch record.* {named}"):
        LaunchRecord.from_json({**record().to_json(), **wrong})
