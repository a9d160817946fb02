"""What a crash means to a person: per class what is seen and why, per remedy one sentence on what to do. Data alone.

The crash gallery in the reference is made of it (docs/reference/crashes.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from pool_managerd.core.crash import CrashClass

REMEDIES: Mapping[str, str] = MappingProxyType({
    "add_ram": "Give the machine or the container more RAM, or use a smaller model, context or number of slots.",
    "check_gpu": "Look at `pool-managerd devices` and `dmesg | grep Xid`; if it goes on, try another build or another GPU.",
    "check_permission": "Let the pool's user read the file or open the device that the line names (daemon.engine_groups).",
    "fetch_model_again": "Fetch the model again and compare its checksum: the file is damaged or not complete.",
    "find_killer": "See whether `dmesg | grep -i 'out of memory'` names it; if not, somebody killed it: look for who did.",
    "fix_driver_setup": "Make `nvidia-smi` work for the pool's user first: there is no driver, or it cannot be reached.",
    "fix_flags": "Correct the flag that the line names; `pool-managerd command {pool_id}` shows all that is passed.",
    "free_port": "Stop the program that holds the port, or let the daemon choose one (leave the pool's port out).",
    "install_library": "Install what the line names, or use a build that brings it along (`ldd` shows what a binary lacks).",
    "look_at_load": "See what it was doing (`pool-managerd logs {pool_id}`); if it was busy, raise health.probe_timeout_ms.",
    "look_at_worker": "A process of the engine died: see whether the kernel killed it for want of RAM, and its lines above.",
    "lower_cache": "Ask for a smaller cache (the line says how much memory there is and what was asked for), or free RAM.",
    "lower_context": "Lower ctx (or the engine's own flag for it) to what the model was made for.",
    "match_weights": "Make config.json, quantization and flags fit the weights, whose shapes differ, or use a newer engine.",
    "none": "Nothing: it ended as it was meant to.",
    "put_model_back": "Put the file back where the line looks for it, or correct the path.",
    "read_log": "Read its log around the end: `pool-managerd logs {pool_id}`.",
    "reboot_or_reload_driver": "Reboot, or reload the driver's modules: another version is loaded than is installed.",
    "reduce_vram": "Lower ctx, slots or layers on the GPU, take a smaller quantization, or free VRAM (`pool-managerd devices`).",
    "replace_gpu": "Reset the GPU; if it happens again, have it replaced (`pool-managerd devices` says which and how).",
    "report_engine_bug": "Try another build of the engine; if it happens again, report it there with this log.",
    "reset_gpu": "Do what `pool-managerd devices` says of the GPU: it needs a reset, or the machine a reboot.",
    "room_for_cache": "Give it more VRAM (a larger share, more GPUs) or a shorter context: the weights left the cache no room.",
    "run_in_foreground": "Keep the server in the foreground: one that goes into the background ends; a script must wait for it.",
    "start_again": "Start it again; its end was not seen, because its supervisor was killed or the machine was reset.",
    "startup_too_slow": "If it was loading, raise health.startup_timeout_ms; else see its log, and where it listens.",
    "stop_vram_users": "Stop what else holds the GPU's memory (`pool-managerd devices` names it), or lower the share asked for.",
    "template_or_tokenizer": "Add the tokenizer or chat template that the line names: the model was converted without it.",
    "update_driver": "Update the NVIDIA driver, or use a build of the engine for the CUDA version that the driver has.",
    "use_fitting_build": "Use a build of the engine for this machine's CPU: this one uses instructions that it lacks.",
    "use_gpu_build": "Use a build of the engine that was compiled for this GPU: this one has no code for it.",
    "use_newer_engine": "Use a newer build of the engine: this one does not know the model's architecture or format.",
    "use_other_format": "Take the model in a number format that this GPU can compute (see dtype, quantization), or a newer GPU.",
    "wait_or_restart": "It is replaced; if it happens again, report it to the engine with its log and the load it had.",
    "why_not_started": "See `last_error`, and `pool-managerd explain {pool_id}` for what a start would do now.",
})  # fmt: skip
"""Sentences by code. Codes are stable: alerts may be routed by them."""


@dataclass(frozen=True, slots=True)
class Meaning:
    """Of one class: what is ``seen``, ``why`` it happens, and the ``remedy`` where no rule knows a better one."""

    seen: str
    why: str
    remedy: str


MEANINGS: Mapping[CrashClass, Meaning] = MappingProxyType({
    CrashClass.GRACEFUL: Meaning(
        "A submitted engine that had been ready ended with exit code 0.", "It may end by itself, and did. A server that this "
        "daemon prepared never ends unasked but by failing: its exit code 0 is `process_exit`.", "none"),
    CrashClass.PROCESS_EXIT: Meaning(
        "The process ended with a code other than 0, and no line of its log is known to name the class of its cause.",
        "The line that says most is quoted. An engine that was ready once is never given a class that would keep it down.",
        "read_log"),
    CrashClass.SIGNAL: Meaning(
        "The kernel or somebody ended it with a signal.", "SIGSEGV, SIGBUS, SIGFPE and SIGABRT are faults of the engine. SIGKILL "
        "is sent by the kernel when RAM runs out, or by a person or program; without a trace of the former both are possible. "
        "A shell tells that its child died so with an exit code of 128 and the signal's number.", "report_engine_bug"),
    CrashClass.OUT_OF_MEMORY: Meaning(
        "SIGKILL that the daemon did not send, and the kernel's out-of-memory killer was at work.", "The evidence says how that "
        "is known: a kernel log line with its pid, the counter of its cgroup, or, weakest, the machine's counter.", "add_ram"),
    CrashClass.OOM_STORM: Meaning(
        "The kernel ended it for want of memory again and again within a minute.", "It needs more RAM than there is. Reports say "
        "`out_of_memory`; this is what the restarts are counted and delayed by.", "add_ram"),
    CrashClass.VRAM_OOM: Meaning(
        "It asked for more memory than the GPU had.", "The model, its context or its cache is larger than was free; or another "
        "program took memory meanwhile.", "reduce_vram"),
    CrashClass.CUDA: Meaning(
        "A call of CUDA failed, or the driver ended the engine's work on the GPU (Xid).", "A fault of the engine's kernels, of a "
        "build that does not fit, or of the GPU. Counted by a breaker of its own, and waited for longer.", "check_gpu"),
    CrashClass.DRIVER_RESET: Meaning(
        "The driver reported an error after which nothing on the GPU goes on.", "The GPU stopped, fell off the bus or must be "
        "reset.", "reset_gpu"),
    CrashClass.ECC: Meaning(
        "An uncorrectable memory error of the GPU ended it.", "Memory cells of the GPU are broken. One may be chance.",
        "replace_gpu"),
    CrashClass.DRIVER_MISMATCH: Meaning(
        "The engine's CUDA and the driver do not fit together.", "The driver is older than the engine's CUDA needs, or its "
        "library and its kernel module are of two versions.", "update_driver"),
    CrashClass.HEALTH_FAILURE: Meaning(
        "It ran, and did not answer its health probes (any more); it was stopped and replaced.", "It hangs, is overloaded, or "
        "loads longer than it may. The last probe's words are the evidence.", "look_at_load"),
    CrashClass.HUNG: Meaning(
        "It answered, or not, while nothing moved in it.", "A deadlock in the engine, or a GPU or storage that does not "
        "answer.", "wait_or_restart"),
    CrashClass.PORT_CONFLICT: Meaning(
        "Another program had its port.", "Before it was ready it is started again on another port, which is no crash; where the "
        "port is fixed, or that did not help, it is.", "free_port"),
    CrashClass.BAD_MODEL: Meaning(
        "It cannot use the model.", "The file is damaged, is not what it says, or is of a kind that this engine or its GPU does "
        "not know. Another start would end the same way.", "fetch_model_again"),
    CrashClass.BAD_FLAGS: Meaning(
        "It does not know a flag, or cannot use its value.", "A typing error, or a flag of another version. Another start would "
        "end the same way.", "fix_flags"),
    CrashClass.MISSING_LIBRARY: Meaning(
        "The dynamic linker or Python did not find what it needs.", "A library or package is not installed, or is too old. "
        "Another start would end the same way.", "install_library"),
    CrashClass.PERMISSION: Meaning(
        "It may not read or write what it needs.", "The pool's user has no right to the file or device. Another start would end "
        "the same way.", "check_permission"),
    CrashClass.ILLEGAL_INSTRUCTION: Meaning(
        "SIGILL before it was ready.", "It was built for another CPU (AVX2, AVX-512). Another start would end the same way.",
        "use_fitting_build"),
    CrashClass.NOT_STARTED: Meaning(
        "The start never came as far as a process, or its helper died.", "The cause stands in `last_error`.", "why_not_started"),
    CrashClass.UNKNOWN: Meaning(
        "It is gone, and how it ended was lost.", "Its supervisor was killed with it, or its record could not be read.",
        "start_again"),
})  # fmt: skip
