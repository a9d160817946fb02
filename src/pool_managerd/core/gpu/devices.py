"""What a scan of this machine's GPUs found: plain frozen values."""

from __future__ import annotations

from dataclasses import dataclass

NOT_PERMITTED = "this user may not open it"
PLACEHOLDER = "GPU-unknown-"
"""What a GPU is called, with its index behind, whose UUID could never be read."""
NO_MEMORY_TOLD = "the driver does not tell how much memory it has"


@dataclass(frozen=True, slots=True)
class DeviceProcess:
    """A process that a GPU lists. ``vram_bytes`` is None where the driver does not tell.

    ``pid`` counts in this process's pid namespace when ``certain``; otherwise it is the driver's own number, which
    may mean another process here. ``start_ticks``, ``nonce`` (of the engine instance that it descends from, by its
    environment) and ``ancestors`` (its parents' pids, nearest first) are None or empty where they cannot be read:
    the process has ended and its memory was not given back (``ended``), or it is not visible here.
    """

    pid: int
    name: str | None = None
    vram_bytes: int | None = None
    kind: str = "compute"
    certain: bool = True
    start_ticks: int | None = None
    nonce: str | None = None
    ancestors: tuple[int, ...] = ()
    ended: bool = False


@dataclass(frozen=True, slots=True)
class DeviceSnapshot:
    """One GPU or MIG instance at one moment (SPEC §5.1). What is not known is None.

    ``id`` is the index that nvidia-smi counts; a MIG instance has its parent's, and names it in ``parent_uuid``.
    ``vram_reserved_bytes`` is what the driver keeps for itself: it is in the total, and neither free nor anybody's.
    ``ecc_uncorrected`` counts since the last driver load. ``reset_pending`` means that repaired memory waits for a
    reset of the GPU. ``error`` says why the GPU does not answer, ``unreadable`` why one that answers could not be read: what
    is known of its memory and processes is then the last known, and what changes by the second is None.
    ``recovery_action`` is the recovery that the driver asks for, in NVML's numbers.
    ``unified``: it has no memory of its own; what it tells is about the machine's RAM, or of the container's limit.
    """

    id: int
    uuid: str
    vram_total_bytes: int
    vram_free_bytes: int
    compute_capability: str | None = None
    name: str = ""
    pci_bus_id: str = ""
    vram_reserved_bytes: int = 0
    processes: tuple[DeviceProcess, ...] = ()
    parent_uuid: str | None = None
    mig_enabled: bool = False
    numa_node: int | None = None
    nvlink_peers: tuple[str, ...] = ()
    temperature_c: int | None = None
    power_watts: float | None = None
    utilization_percent: int | None = None
    ecc_uncorrected: int | None = None
    reset_pending: bool = False
    recovery_action: int | None = None
    unified: bool = False
    persistence_mode: bool | None = None
    error: str | None = None
    unreadable: str | None = None

    @property
    def label(self) -> str:
        """How it is named to readers and in metrics: the index of a whole GPU, the UUID of a MIG instance."""
        return str(self.id) if self.parent_uuid is None else self.uuid

    @property
    def vram_used_bytes(self) -> int:
        """What processes hold; the driver's own part is not counted."""
        return max(0, self.vram_total_bytes - self.vram_free_bytes - self.vram_reserved_bytes)

    @property
    def contains_errors(self) -> bool:
        """From compute capability 8.0 on a memory error may end the programs that met it and no others."""
        major = (self.compute_capability or "").partition(".")[0]
        return major.isdecimal() and int(major) >= 8

    @property
    def readable(self) -> bool:
        """False when what it tells is old."""
        return self.error is None and self.unreadable is None

    @property
    def usable(self) -> bool:
        """True for what an engine may be given: a GPU in MIG mode is used through its instances alone."""
        return self.readable and not self.mig_enabled


@dataclass(frozen=True, slots=True)
class ScanProblem:
    """Why a scan told nothing new. ``code``: ``nvml_unavailable`` (no library), ``driver_mismatch``, ``no_driver``,
    ``nvml_hung``, ``nvml_crashed``, ``nvml_error``, ``released`` (by request) or ``not_scanned``.
    """

    code: str
    message: str
    hint: str = ""


@dataclass(frozen=True, slots=True)
class DeviceScan:
    """All devices at one monotonic second. With a ``problem`` the devices are the last known ones: stale.

    ``missing`` is how many physical GPUs the driver has initialised that this scan does not list.
    """

    devices: tuple[DeviceSnapshot, ...] = ()
    taken_at: float = 0.0
    driver_version: str | None = None
    cuda_version: str | None = None
    problem: ScanProblem | None = None
    missing: int = 0

    @property
    def stale(self) -> bool:
        return self.problem is not None

    def device(self, uuid: str) -> DeviceSnapshot | None:
        """The device of that UUID, None when it is not listed."""
        return next((d for d in self.devices if d.uuid == uuid), None)

    @property
    def no_gpus(self) -> bool:
        """True when this machine is known to have no GPU: there is no driver library, or it lists none."""
        if self.problem is not None:
            return self.problem.code == "nvml_unavailable" and not self.devices
        return not self.devices


@dataclass(frozen=True, slots=True)
class DeviceIncident:
    """An Xid or ECC event. The GPU is named by ``uuid``, or by ``pci_bus_id`` where the kernel log told of it."""

    xid: int | None
    source: str
    uuid: str | None = None
    pci_bus_id: str | None = None
    text: str = ""


NOT_SCANNED = DeviceScan(problem=ScanProblem("not_scanned", "the GPUs were not scanned yet"))
