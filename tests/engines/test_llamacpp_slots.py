"""Which launches of llama-server save their slots, under which key, and how it is asked."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest

from pool_managerd.config import Config
from pool_managerd.core.artifacts import ResolvedModel
from pool_managerd.core.memory.estimate import EngineSettings
from pool_managerd.core.question import Question
from pool_managerd.core.slot_cache import SlotSaving, SlotState
from pool_managerd.engines.adapter import LaunchMemory
from pool_managerd.engines.flags import Option, OptionTable
from pool_managerd.engines.llamacpp.options import recorded_options
from pool_managerd.engines.llamacpp.slots import LlamaSlots, saving_of, with_files

TABLE = recorded_options()
SLOTS = LlamaSlots()


def saving(
    tmp_path: Path, *flags: str, table: OptionTable = TABLE, version: str = "b1", node: dict[str, Any] | None = None, **pool: Any
) -> SlotSaving | None:  # fmt: skip
    model = tmp_path / "m.gguf"
    if not model.exists():
        model.write_bytes(b"GGUF")
    pools = [{"id": "p", "engine": "llamacpp", "model": "file:m.gguf", "ctx": 4096, **pool}]
    config = Config.model_validate({"daemon": {"runtime_dir": tmp_path / "run"}, "pools": pools, **(node or {})})
    return saving_of(config, config.pools[0], ResolvedModel("file:m.gguf", str(model)), flags, table, version)


def test_slots_are_saved_below_what_the_engine_may_write(tmp_path: Path) -> None:
    found = saving(tmp_path)
    assert found is not None and found.directory == f"{tmp_path}/run/cache/p/slots" and not found.unable


def test_none_are_where_nobody_wants_it(tmp_path: Path) -> None:
    assert saving(tmp_path, save_slots=False) is None
    assert saving(tmp_path, node={"slot_cache": {"disk_bytes": 0}}) is None


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (("--model-draft", "d.gguf"), "one of two caches"), (("--spec-type", "draft-mtp"), "one of two caches"),
        (("--no-slots",), "--no-slots"), (("--no-cache-prompt",), "reads every prompt"),
    ],
)  # fmt: skip
def test_why_a_launch_saves_none_is_known(flags: tuple[str, ...], why: str, tmp_path: Path) -> None:
    found = saving(tmp_path, *flags)
    assert found is not None and why in found.unable


def test_a_build_without_the_flag_is_left_alone(tmp_path: Path) -> None:
    found = saving(tmp_path, table=OptionTable([Option(("--model",), (), 1)], {}))
    assert found is not None and "does not know --slot-save-path" in found.unable


@pytest.mark.parametrize(
    ("part", "flags", "changes"),
    [
        ("engine", (), {"version": "b2"}), ("context", (), {"ctx": 8192}), ("slots", (), {"slots": 2}),
        ("cache", ("--cache-type-k", "q8_0"), {}), ("flags", ("--flash-attn", "on"), {}), ("flags", ("--swa-full",), {}),
        ("flags", ("--rope-freq-base", "1000"), {}),
    ],
)  # fmt: skip
def test_what_changes_the_cache_changes_its_part_of_the_key(
    part: str, flags: tuple[str, ...], changes: dict[str, Any], tmp_path: Path
) -> None:
    before, after = saving(tmp_path), saving(tmp_path, *flags, **changes)
    assert before is not None and after is not None
    assert [name for name in before.key if before.key[name] != after.key[name]] == [part]


def test_no_flag_is_in_the_key_as_it_was_written(tmp_path: Path) -> None:
    found = saving(tmp_path, "--chat-template-kwargs", '{"key": "hunter22"}', "--rope-freq-base", "1234")
    assert found is not None and "hunter22" not in str(found.key) and "1234" not in str(found.key)


def test_what_does_not_leaves_it(tmp_path: Path) -> None:
    other = ("--port", "1", "--threads", "8", "-ngl", "99", "--temp", "0.5", "--tensor-split", "1,2", "--alias", "x")
    assert saving(tmp_path, *other) == saving(tmp_path)


def test_another_model_file_in_its_place_is_another_model(tmp_path: Path) -> None:
    before = saving(tmp_path)
    (tmp_path / "m.gguf").write_bytes(b"GGUF2")
    after = saving(tmp_path)
    assert before is not None and after is not None and before.key["model"] != after.key["model"]


def test_another_adapter_in_its_place_is_another_key(tmp_path: Path) -> None:
    lora = tmp_path / "a.gguf"
    lora.write_bytes(b"one")
    memory = LaunchMemory(EngineSettings(), files=(str(lora),))
    first = with_files(saving(tmp_path), memory)
    lora.write_bytes(b"three")
    second = with_files(saving(tmp_path), memory)
    assert first is not None and second is not None and first.key["flags"] != second.key["flags"]


# --- what it is asked, and what it answers ---


def test_slots_say_what_they_hold_once_they_had_a_request() -> None:
    rows = [{"id": 0, "is_processing": False}, {"id": 1, "is_processing": True, "n_prompt_tokens": 7}]
    assert SLOTS.slots(rows) == (SlotState(0, None, busy=False), SlotState(1, 7, busy=True))


@pytest.mark.parametrize("answer", [None, {}, [1], "x"])
def test_an_answer_that_tells_no_slots_is_refused(answer: Any) -> None:
    with pytest.raises(ValueError, match="tells no slots"):
        SLOTS.slots(answer)


def test_rows_that_name_no_slot_of_the_engine_are_left_out() -> None:
    assert SLOTS.slots([{"id": -1}, {"id": "0"}, {"id": 99}]) == ()


def test_it_is_asked_again_for_all_but_the_last_token_in_its_slot() -> None:
    asked = SLOTS.ask_again(2, (5, 6, 7))
    assert asked.path == "/completion" and asked.body is not None
    assert (asked.body["prompt"], asked.body["id_slot"], asked.body["n_predict"]) == ([5, 6], 2, 0)
    assert SLOTS.save(1, "x") == Question("/slots/1?action=save", {"filename": "x"})
    assert SLOTS.restore(1, "x") == Question("/slots/1?action=restore", {"filename": "x"})


@pytest.mark.parametrize("answer", [None, {}, {"timings": {}}, {"timings": {"cache_n": -1}}, {"timings": {"cache_n": True}}])
def test_an_answer_without_the_count_proves_nothing(answer: Any) -> None:
    with pytest.raises(ValueError, match="cache_n"):
        SLOTS.cached(answer)


def test_counts_are_read() -> None:
    assert SLOTS.cached({"timings": {"cache_n": 1999}}) == 1999
    assert SLOTS.saved({"n_saved": 3, "n_written": 99}) == (3, 99)
    assert SLOTS.restored({"n_restored": 3}) == 3


FORMATS = {
    "b10068": struct.pack("<III", 0x67677371, 2, 4),
    "since media can be saved": struct.pack("<IIIiII", 0x67677371, 4, 8, -1, 1, 4),
}


@pytest.mark.parametrize("frame", FORMATS.values(), ids=FORMATS)
def test_tokens_are_found_in_the_files_of_every_known_build(frame: bytes) -> None:
    head = frame + struct.pack("<4i", 100, 137, 0, 3) + b"state"
    assert SLOTS.tokens(head, 4) == (100, 137, 0, 3)
    assert len(frame) + 16 <= SLOTS.head_bytes(4)


@pytest.mark.parametrize(
    ("head", "why"),
    [
        (b"", "none of llama.cpp's"), (b"GGUF" * 8, "none of llama.cpp's"), (struct.pack("<I", 0x67677371), "not known here"),
        (struct.pack("<III", 0x67677371, 2, 4), "not known here"),
        (struct.pack("<III4i", 0x67677371, 2, 4, 1, -1, -1, 5), "images or sound"),
    ],
)  # fmt: skip
def test_a_file_that_nobody_could_prove_is_refused(head: bytes, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        SLOTS.tokens(head, 4)
