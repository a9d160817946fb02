"""The flags of a llama-server or a ``vllm serve`` as keys of a pool; those that have no key stay flags, in their order."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from pool_managerd.core.gpu.masks import DeviceMask
from pool_managerd.errors import SpecError
from pool_managerd.moving.command_line import ReadFlags, Written
from pool_managerd.moving.macros import holds_secret
from pool_managerd.moving.names import usable

_SIZES = {"": 1, "k": 1_000, "K": 1 << 10, "m": 10**6, "M": 1 << 20}
_DAEMON = "the daemon says it itself"
_NEEDLESS = {
    "--port": "the daemon gives each engine a free port", "--host": "engines listen on 127.0.0.1, behind the gateway",
    "--metrics": _DAEMON, "--no-webui": _DAEMON, "--no-ui": _DAEMON, "--offline": _DAEMON, "--slot-save-path": "see slot_cache",
    "--ui": "the engine's own page is off", "--webui": "the engine's own page is off",
    "--api-key": "the engine is reached through the daemon alone; keys are the gateway's",
    "--api-key-file": "the engine is reached through the daemon alone; keys are the gateway's",
}  # fmt: skip
MAX_CTX = 2**31 - 1


@dataclass(slots=True)
class Told:
    """What became of the flags, one entry for each: the flag, the outcome's verb, where it went, why."""

    fields: dict[str, Any] = field(default_factory=dict)
    flags: list[str] = field(default_factory=list)
    ports: list[int] = field(default_factory=list)
    entries: list[tuple[Written, str, str, str]] = field(default_factory=list)
    names: list[str] = field(default_factory=list)

    def mapped(self, flag: Written, to: str, why: str = "") -> None:
        self.entries.append((flag, "mapped", f"pools[].{to}", why))

    def needless(self, flag: Written, why: str) -> None:
        self.entries.append((flag, "needless", "", why))

    def dropped(self, flag: Written, why: str) -> None:
        self.entries.append((flag, "dropped", "", why))

    def kept(self, flag: Written, why: str = "") -> None:
        self.flags += flag.items
        self.entries.append((flag, "kept", "pools[].provisioning.flags", why))


def shown(flag: Written) -> str:
    """A flag as a report names it."""
    return flag.items[0] if not flag.values or flag.name not in ("--n-cpu-moe", "--n-gpu-layers") else " ".join(flag.items[:2])


class FlagMover:
    """The flags of one engine, moved one by one. ``visible`` are the devices that the command is shown, None: all; a name
    that ``is_free`` means no other model.
    """

    def __init__(
        self, engine: str, read: ReadFlags, visible: list[int | str] | None, own_port: int | None, is_free: Callable[[str], bool]
    ) -> None:
        self._engine, self._read, self._own_port, self._is_free = engine, read, own_port, is_free
        self.visible = visible
        self.told = Told()

    def move(self, words: tuple[str, ...]) -> Told:
        uses = self._read(self._engine, words, True)
        if self._engine == "vllm":
            words, uses = self._model_of_vllm(words)
        self._gpus(uses)
        if self._engine == "vllm" and self.visible is not None and "tensor_split" not in self.told.fields:
            self.visible = self.visible[:1]  # it uses no more
        several = self.visible is not None and len(self.visible) > 1
        uses = self._read(self._engine, words, not several)
        last = {use.name: index for index, use in enumerate(uses)}
        self._model = next((use.values[0] for use in reversed(uses) if use.name == "--model" and use.values), "")
        for index, use in enumerate(uses):
            if use.name in _ONCE and last[use.name] != index:
                self.told.needless(use, "a later one wins")
            elif use.name not in _GPU or use.name not in self._settled:
                self._one(use)
        if several and self._engine == "llamacpp":
            self.told.fields.setdefault("tensor_split", "auto")
        return self.told

    def _one(self, use: Written) -> None:
        told = self.told
        if holds_secret(list(use.items)):
            told.dropped(use, "it holds a secret of the environment, which is not written into a file")
        elif use.name == "--port":
            self._port(use)
        elif use.name in _NEEDLESS:
            told.needless(use, _NEEDLESS[use.name])
        elif (move := getattr(self, _MOVES.get(use.name, ""), None)) is not None and use.values:
            move(use)
        elif use.refused:
            told.dropped(use, use.refused)
        elif not use.known and not use.items[0].startswith("-"):
            told.dropped(use, "it is no flag")
        elif not use.known:
            told.kept(use, "checked against what the engine lists when it starts")
        elif use.beside and not self._is_beside(use.values[0]):
            told.kept(use, "the file must lie beside the model, or below the configuration's folder: else it is refused")
        else:
            told.kept(use)

    def _is_beside(self, file: str) -> bool:
        return not self._model or file.startswith(posixpath.dirname(self._model) + "/")

    def _port(self, use: Written) -> None:
        port = _whole(use.values[0]) if use.values else None
        if port is None or port == self._own_port or not 1 <= port <= 65535:
            self.told.needless(use, _NEEDLESS["--port"])
            return
        self.told.ports.append(port)
        self.told.mapped(use, "provisioning.ports")

    def _move_model(self, use: Written) -> None:
        if self._engine == "vllm":
            self._vllm_model(use)
            return
        self.told.fields["model"] = "file:" + use.values[0]
        self.told.mapped(use, "model", "" if use.values[0].startswith("/") else "relative to the configuration's folder")

    def _move_hf(self, use: Written) -> None:
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", use.values[0].rpartition("/")[2]).strip("-.")[:100] or "model"
        self.told.fields.setdefault("model", f"file:models/{name}.gguf")
        how = f"allow it in `policy` and write `model: hf:ORG/REPO:QUANTISATION`, or name a file of yours ({name}.gguf)"
        self.told.dropped(use, how)

    def _move_ctx(self, use: Written) -> None:
        ctx = _whole(use.values[0])
        if ctx == 0:
            self.told.needless(use, "without it the context is the model's own, too")
        elif ctx is None or not 0 < ctx <= MAX_CTX:
            self.told.dropped(use, "it is no number of tokens: set `ctx` of the pool")
        else:
            self.told.fields["ctx"] = ctx
            self.told.mapped(use, "ctx")

    def _move_slots(self, use: Written) -> None:
        slots = _whole(use.values[0])
        if slots is None or slots < 1:
            self.told.needless(use, "it leaves the number to the engine; here it is `slots`")
        else:
            self.told.fields["slots"] = slots
            self.told.mapped(use, "slots")

    def _move_layers(self, use: Written) -> None:
        value = use.values[0].strip().lower()
        if not use.refused or value in ("auto", "-1", "all"):
            self.told.needless(use, "all layers are on the GPU")
        else:
            self.told.dropped(use, use.refused)

    def _move_alias(self, use: Written) -> None:
        name = use.values[0]
        if "," in name or not usable(name):
            self.told.kept(use)
        elif not self._is_free(name):
            self.told.kept(use, "another model is asked for by that name")
        else:
            self.told.fields["served_name"] = name
            self.told.mapped(use, "served_name")

    def _move_names(self, use: Written) -> None:
        self.told.names = list(dict.fromkeys(use.values))
        self.told.mapped(use, "served_name" if len(use.values) == 1 else "served_name, aliases")

    def _move_length(self, use: Written) -> None:
        found = re.fullmatch(r"(\d{1,9})([kKmM]?)", use.values[0])
        if found is None or not (each := int(found[1]) * _SIZES[found[2]]):
            self.told.dropped(use, "it is no number of tokens: set `ctx` of the pool")
            return
        self.told.fields["ctx"] = each
        self.told.mapped(use, "ctx", "ours is for all slots together, so it is × slots")

    def _move_memory(self, use: Written) -> None:
        if use.values[0] in ("0.9", "0.90"):
            self.told.needless(use, "0.9 is what is reserved without `vram_bytes`")
        else:
            self.told.dropped(use, f"set `vram_bytes` of the pool to {use.values[0]} of the GPU's memory; without, it is 0.9")

    def _model_of_vllm(self, words: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[Written, ...]]:
        """The model stands before the flags, or behind ``--model``."""
        if words and not words[0].startswith("-"):
            self._vllm_model(Written("MODEL", (words[0],), (words[0],)))
            words = words[1:]
        return words, self._read(self._engine, words, True)

    def _vllm_model(self, use: Written) -> None:
        name = use.values[0]
        if name.startswith(("/", "./", "../", "~")):
            self.told.fields["model"] = "file:" + name
            self.told.mapped(use, "model")
        else:
            folder = re.sub(r"[^A-Za-z0-9._-]+", "-", name.rpartition("/")[2]).strip("-.")[:100] or "model"
            self.told.fields.setdefault("model", f"file:models/{folder}")
            self.told.dropped(use, f"no repository is downloaded yet: get the folder yourself, and name it in `model` ({folder})")

    # What decides which GPUs the engine sees comes first: other flags mean something else on one than on several.
    def _gpus(self, uses: tuple[Written, ...]) -> None:
        given = {use.name: use for use in uses if use.name in _GPU and use.values}
        self._settled: set[str] = set()
        for name, move in (
            ("--device", self._device), ("--tensor-parallel-size", self._parallel), ("--tensor-split", self._split),
            ("--split-mode", self._split_mode),
        ):  # fmt: skip
            if name in given and move(given[name], given):
                self._settled.add(name)

    def _device(self, use: Written, given: dict[str, Written]) -> bool:
        found = [re.fullmatch(r"CUDA(\d{1,3})", part.strip(), re.IGNORECASE) for part in use.values[0].split(",")]
        numbers = [int(one[1]) for one in found if one is not None]
        if len(numbers) != len(found) or not self._choose(numbers):
            return False
        self.told.mapped(use, "devices", "indices are in PCI order here")
        return True

    def _parallel(self, use: Written, given: dict[str, Written]) -> bool:
        number = _whole(use.values[0]) or 0
        if number == 1:
            self.told.needless(use, "without `tensor_split` the engine has one GPU")
            return True
        if number < 1 or number > 64 or not self._choose(list(range(number))):
            return False
        self.told.fields["tensor_split"] = "auto"
        self.told.mapped(use, "tensor_split")
        return True

    def _split(self, use: Written, given: dict[str, Written]) -> bool:
        try:
            shares = [float(part) for part in re.split(r"[,/]", use.values[0]) if part.strip()]
        except ValueError:
            return False
        if self.visible is not None:
            shares = shares[: len(self.visible)]
        kept = [index for index, share in enumerate(shares) if share > 0]
        if not kept or len(shares) > 64 or not all(0 <= share < 1e9 for share in shares) or not self._choose(kept):
            return False
        if len(kept) > 1:
            self.told.fields["tensor_split"] = [int(s) if s.is_integer() else s for s in (shares[i] for i in kept)]
        self.told.mapped(use, "tensor_split" if len(kept) > 1 else "devices", "one share for each of `devices`")
        return True

    def _split_mode(self, use: Written, given: dict[str, Written]) -> bool:
        """``none`` is one GPU, the first or the one that ``--main-gpu`` says."""
        main = given.get("--main-gpu")
        number = _whole(main.values[0]) if main is not None else 0
        several = self.visible is None or len(self.visible) > 1
        if use.values[0] != "none" or number is None or not (several and (main is not None or self.visible is not None)):
            return False
        if not self._choose([number]):
            return False
        self.told.fields.pop("tensor_split", None)
        self.told.mapped(use, "devices", "one GPU")
        if main is not None:
            self.told.mapped(main, "devices")
            self._settled.add("--main-gpu")
        return True

    def _choose(self, numbers: list[int]) -> bool:
        """Make the GPUs of these places the only ones; False where there are none, or one twice."""
        if not numbers or len(set(numbers)) != len(numbers):
            return False
        if self.visible is not None and max(numbers) >= len(self.visible):
            return False
        self.visible = list(numbers) if self.visible is None else [self.visible[number] for number in numbers]
        return True


_GPU = frozenset({"--device", "--tensor-parallel-size", "--tensor-split", "--split-mode", "--main-gpu"})
_MOVES = {
    "--model": "_move_model", "--hf-repo": "_move_hf", "--ctx-size": "_move_ctx", "--parallel": "_move_slots",
    "--n-gpu-layers": "_move_layers", "--alias": "_move_alias", "--served-model-name": "_move_names",
    "--max-model-len": "_move_length", "--max-num-seqs": "_move_slots", "--gpu-memory-utilization": "_move_memory",
}  # fmt: skip
_ONCE = frozenset({*_MOVES, *_GPU, "--port"})


def _whole(text: str) -> int | None:
    return int(text) if re.fullmatch(r"-?\d{1,10}", text.strip()) else None


def devices(text: str) -> list[int | str]:
    """What CUDA_VISIBLE_DEVICES shows. Raises ValueError for what names no GPU."""
    if text.strip() in ("", "-1", "none", "NoDevFiles"):
        raise ValueError("it shows the engine no GPU: with `profile: dev` engines may run on the CPU")
    try:
        return list(DeviceMask.parse(text).items)
    except SpecError as error:
        raise ValueError(error.message) from None
