"""What is to be found about memory, disks and limits."""

from __future__ import annotations

from collections.abc import Iterator

from pool_managerd.core.preflight.facts import Folder, HostFacts, Wants
from pool_managerd.core.preflight.findings import FAIL, OK, WARN, Finding
from pool_managerd.core.preflight.ports import port_findings

_MIB, _GIB = 1 << 20, 1 << 30
LEAST_FREE_BYTES = {"tmp": 16 * _MIB}  # engines and this daemon fail below it; other folders: 64 MiB
DEFAULT_LEAST_FREE_BYTES = 64 * _MIB
LOW_FREE_BYTES = _GIB
SHM = "/dev/shm"  # noqa: S108 - shared memory, not a place for temporary files
LEAST_SHM_BYTES = _GIB
LEAST_MEMLOCK_BYTES = 64 * _MIB
LOW_RAM_BYTES = _GIB
_FILES, _FILES_PER_POOL = 256, 32
_RAM_USE = ("free -h", "ps -eo rss,pid,comm --sort=-rss | head")
_AS_ROOT = ("sudo systemctl edit pool-managerd  # User=root; without daemon.engine_user each pool gets a uid of its own",)


def machine_findings(facts: HostFacts, wants: Wants) -> Iterator[Finding]:
    yield from _setups(facts, wants)
    yield from _folders(facts)
    yield from _memory(facts, wants)
    yield from _limits(facts, wants)
    yield from port_findings(facts, wants)
    yield from _isolation(facts, wants)


def _isolation(facts: HostFacts, wants: Wants) -> Iterator[Finding]:
    """What will be applied to engines here; what else the kernel could do does not count."""
    if facts.no_user is not None:
        yield Finding("isolation", FAIL, "engine isolation", facts.no_user, _AS_ROOT)
    elif wants.profile == "cloud" and (facts.shared_user is not None or not facts.as_root):
        why = facts.shared_user or "engines run as the daemon's own user"
        yield Finding("isolation", FAIL, "engine isolation", f"cannot isolate engines from the daemon: {why}", _AS_ROOT)


def _setups(facts: HostFacts, wants: Wants) -> Iterator[Finding]:
    """Pools whose start would be refused for their model or engine, whatever the machine has."""
    for package, message, hint in facts.package_problems:
        yield Finding("engine_package", FAIL, package, message, (hint,) if hint else ())
    wanted = {pool.pool_id for pool in wants.pools}
    for pool_id, message, hint in facts.setup_problems:
        if pool_id in wanted:
            yield Finding("pool_setup", FAIL, f"pool {pool_id}", message, (f"# {hint}",) if hint else ())


def _folders(facts: HostFacts) -> Iterator[Finding]:
    good: list[str] = []
    for folder in facts.folders:
        found = _folder(folder)
        if found is None:
            good.append(folder.role)
        else:
            yield found
    if good:
        yield Finding("folders", OK, ", ".join(sorted(set(good))), "the directories can be written to and have room")


def _folder(folder: Folder) -> Finding | None:
    if folder.problem is not None:
        message = f"cannot write to the {folder.role} directory {folder.path}: {folder.problem}"
        remedy = (f"sudo install -d -o $(id -un) {_quoted(folder.path)}",)
        return Finding("not_writable", FAIL, folder.path, message, remedy)
    if folder.free_bytes is None:
        return None
    least, usage = LEAST_FREE_BYTES.get(folder.role, DEFAULT_LEAST_FREE_BYTES), f"df -h {_quoted(folder.path)}"
    if folder.free_bytes < least:
        message = (
            f"cannot use the {folder.role} directory {folder.path}: {_mib(folder.free_bytes)} are free, {_mib(least)} are needed"
        )
        return Finding("disk_full", FAIL, folder.path, message, (usage, f"du -xh {_quoted(folder.path)} | sort -h | tail"))
    if folder.free_bytes < LOW_FREE_BYTES:
        message = f"the disk of the {folder.role} directory {folder.path} is nearly full: {_mib(folder.free_bytes)} are free"
        return Finding("disk_low", WARN, folder.path, message, (usage,))
    return None


def _memory(facts: HostFacts, wants: Wants) -> Iterator[Finding]:
    available = facts.ram_available_bytes
    if available is None:
        return
    on_cpu = not wants.gpu_only and facts.scan.no_gpus
    sizes = ((facts.model_bytes.get(pool.pool_id, 0), pool.pool_id) for pool in wants.local_pools)
    largest, pool_id = max(sizes, default=(0, ""))
    if on_cpu and largest > available:
        message = f"cannot load the model of pool {pool_id} into RAM: it has {_mib(largest)}, {_mib(available)} are available"
        yield Finding("ram", FAIL, f"pool {pool_id}", message, _RAM_USE)
    elif available < LOW_RAM_BYTES:
        yield Finding("ram", WARN, "RAM", f"only {_mib(available)} of RAM are available", _RAM_USE)
    else:
        total = f" of {_mib(facts.ram_total_bytes)}" if facts.ram_total_bytes else ""
        yield Finding("ram", OK, "RAM", f"{_mib(available)}{total} are available")


def _limits(facts: HostFacts, wants: Wants) -> Iterator[Finding]:
    needed = _FILES + _FILES_PER_POOL * len(wants.pools)
    if facts.open_files is not None and facts.open_files < needed:
        message = f"only {facts.open_files} files may be open at once, {needed} are needed for {len(wants.pools)} pools"
        remedy = (f"ulimit -n {needed}", f"LimitNOFILE={max(65536, needed)}  # in the systemd unit")
        yield Finding("open_files", WARN, "ulimit -n", message, remedy)
    several = len(facts.gpus) > 1
    if facts.memlock_bytes is not None:
        locked = max((facts.model_bytes.get(pool.pool_id, 0) for pool in wants.local_pools if pool.mlock), default=0)
        least = max(locked, LEAST_MEMLOCK_BYTES if several else 0)
        if facts.memlock_bytes < least:
            message = (
                f"only {_mib(facts.memlock_bytes)} may be locked in memory: --mlock and GPU to GPU transfers need {_mib(least)}"
            )
            remedy = ("ulimit -l unlimited", "LimitMEMLOCK=infinity  # in the systemd unit")
            yield Finding("memlock", WARN, "ulimit -l", message, remedy)
    if several and facts.shm_total_bytes is not None and facts.shm_total_bytes < LEAST_SHM_BYTES:
        has, needs = _mib(facts.shm_total_bytes), _mib(LEAST_SHM_BYTES)
        message = f"{SHM} has {has}: engines on several GPUs exchange data there and need {needs}"
        yield Finding("shm", WARN, SHM, message, (f"sudo mount -o remount,size=8G {SHM}",))


def _mib(size: int) -> str:
    return f"{size // _MIB:,} MiB"


def _quoted(path: str) -> str:
    """For a POSIX shell."""
    return "'" + path.replace("'", "'\\''") + "'"
