"""llama-server's slots: whether this launch can save them, what a saved one depends on, and the requests for it.

What is known to go wrong there: a restore reports success and the next request reads its whole prompt again (builds without
the fix, and models with a sliding window or a recurrent state, whose checkpoints are not saved); a file of another model of the
same shape is read without a word; a draft model's cache is not saved; a file must fit the context. So a restore is believed
when a request says that its tokens were there, and not before.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pool_managerd.config import Config, PoolConfig
from pool_managerd.core.artifacts import ResolvedModel
from pool_managerd.core.question import Question
from pool_managerd.core.slot_cache import SlotSaving, SlotState, directory_of
from pool_managerd.engines.adapter import LaunchMemory
from pool_managerd.engines.flags import FlagUse, OptionTable, collapse
from pool_managerd.engines.llamacpp.command import SLOT_SAVE_PATH as FLAG

_MAGIC = struct.pack("<I", 0x67677371)
_FRAME_WORDS = 16
"""Behind its magic number a file has versions and lengths, which differ from build to build, then its tokens."""
_MAX_TOKENS = 1 << 22

_DRAFTS = ("--model-draft", "--spec-default")
_CACHE_TYPES = ("--cache-type-k", "--cache-type-v")
_INDIFFERENT = (
    "--model", "--host", "--port", "--ctx-size", "--parallel", FLAG, "--metrics", "--no-webui", "--offline", "--cors-origins",
    "--threads", "--threads-batch", "--threads-http", "--verbosity", "--log-verbosity", "--alias", "--tensor-split",
    "--n-gpu-layers", "--main-gpu", "--device", "--warmup", "--no-warmup", "--temp", "--top-k", "--top-p", "--min-p", "--seed",
    "--repeat-penalty", "--predict", "--chat-template", "--chat-template-file", "--jinja", "--cache-ram",
    "--slot-prompt-similarity",
)  # fmt: skip
"""Flags that do not change what is in a cache, or are a part of the key by themselves."""


def saving_of(
    config: Config, pool: PoolConfig, model: ResolvedModel, flags: Sequence[str], table: OptionTable, version: str
) -> SlotSaving | None:  # fmt: skip
    """Where and under which key a launch with ``flags`` saves its slots; None where it was not asked to. Blocks for a look at
    the files that it loads.
    """
    if not (config.slot_cache.disk_bytes and pool.save_slots):
        return None
    uses = collapse(table.parse(flags))
    if (why := _unable(uses, table)) is not None:
        return SlotSaving(unable=why)
    key = {
        "model": ";".join([model.id, *(_stamp(path) for path in model.files or (model.local_path,))]),
        "engine": version, "context": str(pool.ctx), "slots": str(pool.slots),
        "cache": _shown(uses, table, lambda use: _is(use, _CACHE_TYPES, table)),
        "flags": _digest(_shown(uses, table, lambda use: not _is(use, (*_INDIFFERENT, *_CACHE_TYPES), table))),
    }  # fmt: skip
    return SlotSaving(directory_of(str(config.daemon.runtime_dir.absolute()), pool.id), key)


def with_files(saving: SlotSaving | None, memory: LaunchMemory) -> SlotSaving | None:
    """The key with the content of the files that are loaded beside the model, too: adapters, projectors."""
    if saving is None or saving.unable or not memory.files:
        return saving
    return SlotSaving(saving.directory, {**saving.key, "flags": ";".join([saving.key["flags"], *map(_stamp, memory.files)])})


def _unable(uses: Mapping[str, FlagUse], table: OptionTable) -> str | None:
    if FLAG not in table:
        return f"this build of llama.cpp does not know {FLAG}"
    for use in uses.values():
        if _is(use, _DRAFTS, table) or (_is(use, ("--spec-type",), table) and any("draft" in value for value in use.values)):
            return f"with {use.name} llama.cpp saves one of two caches, and an engine needs both"
        if use.name == "--no-slots":
            return "with --no-slots the engine does not tell what is in its slots"
        if use.name == "--no-cache-prompt":
            return "with --no-cache-prompt the engine reads every prompt from its beginning"
    return None


def _is(use: FlagUse, names: Iterable[str], table: OptionTable) -> bool:
    return any(table.names(use, name) for name in names)


def _shown(uses: Mapping[str, FlagUse], table: OptionTable, wanted: Any) -> str:
    return " ".join(item for use in sorted(uses.values(), key=lambda use: use.name) if wanted(use) for item in use.argv)


def _digest(text: str) -> str:
    """The key is written down with the launch, and flags may say what nobody is to read there."""
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _stamp(path: str) -> str:
    """Tells a file's content from another's, as long as nobody sets its time back."""
    try:
        info = Path(path).stat()
    except OSError:  # which the launch will tell
        return path
    return f"{path}:{info.st_size}:{info.st_mtime_ns}"


class LlamaSlots:
    """See `core.slot_dialect`."""

    def head_bytes(self, tokens: int) -> int:
        return 4 * (_FRAME_WORDS + min(tokens, _MAX_TOKENS))

    def list_slots(self) -> Question:
        return Question("/slots")

    def slots(self, answer: Any) -> tuple[SlotState, ...]:
        """A slot says how much it holds once it has had a request."""
        if not isinstance(answer, list) or not all(isinstance(row, dict) for row in answer):
            raise ValueError("it tells no slots")
        rows = [(row.get("id"), row.get("n_prompt_tokens"), row.get("is_processing")) for row in answer]
        return tuple(
            SlotState(number, tokens if type(tokens) is int else None, busy is not False)
            for number, tokens, busy in rows if type(number) is int and 0 <= number < len(rows)
        )  # fmt: skip

    def save(self, slot: int, name: str) -> Question:
        return Question(f"/slots/{slot}?action=save", {"filename": name})

    def saved(self, answer: Any) -> tuple[int, int]:
        return _count(answer, "n_saved"), _count(answer, "n_written")

    def restore(self, slot: int, name: str) -> Question:
        return Question(f"/slots/{slot}?action=restore", {"filename": name})

    def restored(self, answer: Any) -> int:
        return _count(answer, "n_restored")

    def tokens(self, head: bytes, count: int) -> tuple[int, ...]:
        """They stand behind their number, which the engine told when it saved them. One below 0 stands for an image."""
        if not head.startswith(_MAGIC):
            raise ValueError("the file is none of llama.cpp's")
        words = struct.unpack(f"<{len(head) // 4}i", head[: len(head) // 4 * 4])
        starts = [at + 1 for at in range(1, min(_FRAME_WORDS, len(words) - count)) if words[at] == count]
        found = [words[start : start + count] for start in starts]
        if (tokens := next((each for each in found if min(each) >= 0), None)) is not None:
            return tokens
        if found:
            raise ValueError("it holds images or sound, which nobody can ask for again to see whether they are there")
        raise ValueError("the file has a format that is not known here, so that nobody can see whether it was restored")

    def ask_again(self, slot: int, tokens: Sequence[int]) -> Question:
        """Without the last one: of a full context that is one too many."""
        body = {
            "prompt": list(tokens[:-1] or tokens), "n_predict": 0, "id_slot": slot, "cache_prompt": True, "temperature": 0,
            "stream": False, "response_fields": ["timings"],
        }  # fmt: skip
        return Question("/completion", body)

    def cached(self, answer: Any) -> int:
        timings = answer.get("timings") if isinstance(answer, dict) else None
        return _count(timings, "cache_n")


def _count(answer: Any, name: str) -> int:
    value = answer.get(name) if isinstance(answer, dict) else None
    if type(value) is not int or value < 0:
        raise ValueError(f"it answered without {name}")
    return value
