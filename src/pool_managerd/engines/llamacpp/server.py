"""Runs the llama.cpp server of the ``xllamacpp`` package as its own process, with llama-server's own flags.

Started by path (``python -I …/llamacpp/server.py --model …``), so it imports nothing of this package: an engine
starts without paying for the daemon's libraries. ``OPTIONS`` is also what configured flags are checked against.

Exit codes: 0 after SIGTERM or SIGINT, 1 when the server cannot start, 2 for flags it does not know. While the model
is loading the C++ code holds the interpreter, so SIGTERM keeps its default action and ends the process at once.
"""

from __future__ import annotations

import difflib
import os
import re
import signal
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

USAGE = 2

LIBRARY_PACKAGES = {
    "libgomp.so.1": "libgomp1",
    "libstdc++.so.6": "libstdc++6",
    "libgcc_s.so.1": "libgcc-s1",
    "libvulkan.so.1": "libvulkan1",
    "libcurl.so.4": "libcurl4",
    "libssl.so.3": "libssl3",
    "libcrypto.so.3": "libssl3",
    "libnuma.so.1": "libnuma1",
    "libopenblas.so.0": "libopenblas0",
    "libatomic.so.1": "libatomic1",
    "libz.so.1": "zlib1g",
    "libzstd.so.1": "libzstd1",
}
"""Debian's package of each shared library that llama.cpp's builds need beside libc."""

_MISSING_LIBRARY = re.compile(r"(lib[\w.+-]{1,100}\.so[\w.]{0,20}): cannot open shared object file")


def missing_library(text: str) -> tuple[str, str] | None:
    """The shared library that ``text`` of a loader says is missing, and what gets it; None when it says no such thing."""
    found = _MISSING_LIBRARY.search(text)
    if found is None:
        return None
    name = found[1]
    if name in LIBRARY_PACKAGES:
        return name, f"apt-get install {LIBRARY_PACKAGES[name]} (Debian, Ubuntu)"
    if name.startswith("libcuda.so"):
        return name, "install the NVIDIA driver, whose library it is"
    if name.startswith(("libcudart.", "libcublas", "libcufft", "libnccl", "libcudnn")):
        return name, "install the CUDA runtime that this build was made for, or set LD_LIBRARY_PATH in provisioning.env"
    return name, f"find its package with: apt-file search {name}; or set LD_LIBRARY_PATH in provisioning.env"


@dataclass(frozen=True, slots=True)
class Member:
    """A converter from ``layer`` to ``LLAMA_SPLIT_MODE_LAYER`` of one of the module's enums."""

    enum: str
    prefix: str
    synonyms: Mapping[str, str] = field(default_factory=dict)

    def of(self, module: Any, text: str) -> Any:
        word = self.synonyms.get(text, text).replace("-", "_").upper()
        members = getattr(module, self.enum)
        member = getattr(members, self.prefix + word, None)
        if member is None:
            known = [name.removeprefix(self.prefix).lower() for name in dir(members) if name.startswith(self.prefix)]
            raise ValueError(f"it must be one of {', '.join(sorted({*known, *self.synonyms}))}")
        return member


@dataclass(frozen=True, slots=True)
class LaunchOption:
    """One flag: its names, the names that negate it, how many values follow, and what it sets.

    ``attr`` is a dotted attribute of ``CommonParams``; ``convert`` makes its value out of the text.
    """

    names: tuple[str, ...]
    attr: str
    convert: Callable[[str], Any] | Member | None = None
    negated: tuple[str, ...] = ()
    inverted: bool = False

    @property
    def values(self) -> int:
        return 0 if self.convert is None else 1


def _layers(text: str) -> int:
    return {"auto": -1, "all": 999}[text] if text in ("auto", "all") else int(text)


def _on_off(text: str) -> bool:
    if text not in ("on", "off"):
        raise ValueError("it must be on or off")
    return text == "on"


def _folder(text: str) -> str:
    """llama.cpp puts a file's name right behind it."""
    return text if text.endswith("/") else text + "/"


def _ratios(text: str) -> list[float]:
    ratios = [float(part) for part in text.replace("/", ",").split(",")]
    return ratios + [0.0] * (128 - len(ratios))


def _switch(attr: str, *names: str, no: tuple[str, ...] = (), inverted: bool = False) -> LaunchOption:
    return LaunchOption(names, attr, negated=no, inverted=inverted)


_KV_TYPE = Member("ggml_type", "GGML_TYPE_")

OPTIONS: tuple[LaunchOption, ...] = (
    LaunchOption(("-m", "--model"), "model.path", str),
    LaunchOption(("--host",), "hostnames", lambda text: [text]),
    LaunchOption(("--port",), "port", int),
    LaunchOption(("-c", "--ctx-size"), "n_ctx", int),
    LaunchOption(("-np", "--parallel"), "n_parallel", int),
    LaunchOption(("-ngl", "--gpu-layers", "--n-gpu-layers"), "n_gpu_layers", _layers),
    LaunchOption(("-t", "--threads"), "cpuparams.n_threads", int),
    LaunchOption(("-tb", "--threads-batch"), "cpuparams_batch.n_threads", int),
    LaunchOption(("--threads-http",), "n_threads_http", int),
    LaunchOption(("-b", "--batch-size"), "n_batch", int),
    LaunchOption(("-ub", "--ubatch-size"), "n_ubatch", int),
    LaunchOption(("-n", "--predict", "--n-predict"), "n_predict", int),
    LaunchOption(("--keep",), "n_keep", int),
    LaunchOption(
        ("-fa", "--flash-attn"),
        "flash_attn_type",
        Member("llama_flash_attn_type", "LLAMA_FLASH_ATTN_TYPE_", {"on": "enabled", "off": "disabled"}),
    ),
    LaunchOption(("-ctk", "--cache-type-k"), "cache_type_k", _KV_TYPE),
    LaunchOption(("-ctv", "--cache-type-v"), "cache_type_v", _KV_TYPE),
    LaunchOption(("-ts", "--tensor-split"), "tensor_split", _ratios),
    LaunchOption(("-fit", "--fit"), "fit_params", _on_off),
    LaunchOption(("-mg", "--main-gpu"), "main_gpu", int),
    LaunchOption(("-sm", "--split-mode"), "split_mode", Member("llama_split_mode", "LLAMA_SPLIT_MODE_")),
    LaunchOption(("-s", "--seed"), "sampling.seed", int),
    LaunchOption(("--temp", "--temperature"), "sampling.temp", float),
    LaunchOption(("--top-k",), "sampling.top_k", int),
    LaunchOption(("--top-p",), "sampling.top_p", float),
    LaunchOption(("--min-p",), "sampling.min_p", float),
    LaunchOption(("--repeat-penalty",), "sampling.penalty_repeat", float),
    LaunchOption(("--rope-freq-base",), "rope_freq_base", float),
    LaunchOption(("--rope-freq-scale",), "rope_freq_scale", float),
    LaunchOption(("--pooling",), "pooling_type", Member("llama_pooling_type", "LLAMA_POOLING_TYPE_")),
    LaunchOption(("-a", "--alias"), "model_alias", lambda text: set(text.split(","))),
    LaunchOption(("-mm", "--mmproj"), "mmproj.path", str),
    LaunchOption(("--chat-template",), "chat_template", str),
    LaunchOption(
        ("--reasoning-format",),
        "reasoning_format",
        Member("common_reasoning_format", "COMMON_REASONING_FORMAT_"),
    ),
    LaunchOption(("--cache-reuse",), "n_cache_reuse", int),
    LaunchOption(("-cram", "--cache-ram"), "cache_ram_mib", int),
    LaunchOption(("--slot-save-path",), "slot_save_path", _folder),
    LaunchOption(("--cors-origins",), "cors_origins", str),
    LaunchOption(("-sps", "--slot-prompt-similarity"), "slot_prompt_similarity", float),
    LaunchOption(("--sleep-idle-seconds",), "sleep_idle_seconds", int),
    LaunchOption(("-lv", "--verbosity", "--log-verbosity"), "verbosity", int),
    _switch("endpoint_metrics", "--metrics"),
    _switch("endpoint_slots", "--slots", no=("--no-slots",)),
    _switch("ui", "--ui", "--webui", no=("--no-ui", "--no-webui")),
    _switch("cont_batching", "-cb", "--cont-batching", no=("-nocb", "--no-cont-batching")),
    _switch("ctx_shift", "--context-shift", no=("--no-context-shift",)),
    _switch("kv_unified", "-kvu", "--kv-unified", no=("-no-kvu", "--no-kv-unified")),
    _switch("no_kv_offload", "-kvo", "--kv-offload", no=("-nkvo", "--no-kv-offload"), inverted=True),
    _switch("no_op_offload", "--op-offload", no=("--no-op-offload",), inverted=True),
    _switch("warmup", "--warmup", no=("--no-warmup",)),
    _switch("use_jinja", "--jinja", no=("--no-jinja",)),
    _switch("cache_prompt", "--cache-prompt", no=("--no-cache-prompt",)),
    _switch("offline", "--offline"),
    _switch("embedding", "--embedding", "--embeddings"),
    _switch("check_tensors", "--check-tensors"),
    _switch("swa_full", "--swa-full"),
)

_BY_NAME = {name: option for option in OPTIONS for name in (*option.names, *option.negated)}


class FlagError(Exception):
    """A flag that is unknown, lacks its value or has one that does not fit."""


def apply_flags(flags: Sequence[str], params: Any, module: Any) -> bool:
    """Set what ``flags`` say on ``params``. Returns whether ``--require-gpu`` was among them. Raises FlagError."""
    require_gpu = False
    rest = list(flags)
    while rest:
        name = rest.pop(0)
        if name == "--require-gpu":
            require_gpu = True
            continue
        option = _BY_NAME.get(name)
        if option is None:
            near = difflib.get_close_matches(name, _BY_NAME, n=1)
            raise FlagError(f"unknown flag {name!r}" + (f" (did you mean {near[0]!r}?)" if near else ""))
        value: Any = (name not in option.negated) != option.inverted
        if option.convert is not None:
            if not rest:
                raise FlagError(f"the flag {name} needs a value")
            text = rest.pop(0)
            try:
                value = option.convert.of(module, text) if isinstance(option.convert, Member) else option.convert(text)
            except ValueError as error:
                raise FlagError(f"cannot use {text!r} for {name}: {error}") from error
        target, _, attr = option.attr.rpartition(".")
        holder = getattr(params, target) if target else params
        if isinstance(value, set):  # every use adds to it
            value |= set(getattr(holder, attr))
        setattr(holder, attr, value)
    return require_gpu


def _fail(text: str, code: int = 1) -> NoReturn:
    print(f"llamacpp_server: {text}", file=sys.stderr, flush=True)
    # Threads of the C++ server may still run; leaving through the interpreter's teardown would wait for them.
    os._exit(code)


def _check_port(host: str, port: int) -> None:
    """Say plainly that the port is taken; the C++ server only says that it failed."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            _fail(f"cannot listen on {host}:{port}: {error.strerror} (address in use or not ours)")


def _check_gpu(module: Any) -> None:
    names = [f"{device['name']} ({device['description']})" for device in module.get_device_info()]
    cpu = module.ggml_backend_dev_type.GGML_BACKEND_DEVICE_TYPE_CPU
    if all(device["type"] == cpu for device in module.get_device_info()):
        _fail(f"GPU-only enforcement: this build of llama.cpp sees no GPU, only {', '.join(names) or 'nothing'}")


def _wait_for_stop() -> None:
    """Block until SIGTERM or SIGINT, whichever thread the kernel hands it to: the wake-up descriptor tells."""
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    signal.set_wakeup_fd(write_end)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    wanted = {int(signal.SIGTERM), int(signal.SIGINT)}
    while wanted.isdisjoint(os.read(read_end, 16)):
        pass


def main(argv: Sequence[str]) -> NoReturn:
    """Serve until told to stop."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        import xllamacpp
    except ModuleNotFoundError as error:
        _fail(f"cannot import xllamacpp: {error}; install it with: pip install 'pool-managerd[llamacpp]'")
    except ImportError as error:
        missing = missing_library(str(error))
        if missing is not None:
            _fail(f"cannot load xllamacpp: a shared library is missing: {missing[0]}; {missing[1]}")
        _fail(f"cannot load xllamacpp: {error}; it was built for another system, or is damaged")
    params = xllamacpp.CommonParams()
    params.hostnames = ["127.0.0.1"]
    try:
        require_gpu = apply_flags(argv, params, xllamacpp)
    except FlagError as error:
        _fail(str(error), USAGE)
    if require_gpu:
        _check_gpu(xllamacpp)
    params.cors_origins_explicit = True
    _check_port(params.hostnames[0], params.port)
    try:
        server = xllamacpp.Server(params)
    except (RuntimeError, ValueError, OSError) as error:
        _fail(f"cannot start the llama.cpp server: {error}")
    print(f"llamacpp_server: listening on {server.listening_address}", file=sys.stderr, flush=True)
    _wait_for_stop()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
