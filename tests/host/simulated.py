"""Simulated GPUs for tests: topologies as text, and their file."""

from __future__ import annotations

import os
from pathlib import Path

_RUN = f"{os.getpid():08x}"


def gpu_uuid(number: int) -> str:
    """A GPU's UUID, of this test run alone: an ``engines`` directive looks at every process of the machine."""
    return f"GPU-{_RUN}-0000-4000-8000-{number:012}"


MIG_UUIDS = tuple(f"MIG-{_RUN}-0000-4000-8000-{number:012}" for number in (1, 2))
NONE = "driver 570.86.15\ncuda 12.8\n"
ONE_24 = NONE + (
    f'gpu 0 uuid={gpu_uuid(0)} name="NVIDIA GeForce RTX 3090" pci=0000:01:00.0 cc=8.6'
    " vram=24GiB reserved=400MiB numa=0 temperature=41 power=30\n"
)
TWO_24_12 = ONE_24 + (
    f'gpu 1 uuid={gpu_uuid(1)} name="NVIDIA GeForce RTX 3060" pci=0000:02:00.0 cc=8.6 vram=12GiB reserved=300MiB numa=0\n'
)


def eight_80(order: tuple[int, ...] = tuple(range(8))) -> str:
    """Eight GPUs of 80 GB, NVLink in pairs, two NUMA nodes. ``order`` says which card is listed at which index."""
    lines = [
        f'gpu {index} uuid={gpu_uuid(card)} name="NVIDIA H100 80GB HBM3" pci=0000:{0x11 + card:02x}:00.0 cc=9.0 vram=80GiB'
        f" reserved=600MiB numa={card // 4} ecc=on power=70"
        for index, card in enumerate(order)
    ]
    pairs = [
        f"nvlink {order.index(card)} {order.index(card + 1)}"
        for card in range(0, 8, 2)
        if card in order and card + 1 in order
    ]  # fmt: skip
    return NONE + "".join(f"{line}\n" for line in [*lines, *pairs])


A100 = NONE + f'gpu 0 uuid={gpu_uuid(0)} name="NVIDIA A100-SXM4-80GB" cc=8.0 vram=80GiB reserved=600MiB numa=0 ecc=on\n'
MIG = A100 + "".join(
    f"mig 0 uuid={uuid} vram={10 * n}GiB profile={n}g.{10 * n}gb gi={n} ci=0\n" for n, uuid in enumerate(MIG_UUIDS, 1)
)


def topology(path: Path, text: str, *lines: str) -> Path:
    """(Re)write the topology file at once, as a careful operator would: nobody sees half of it."""
    scratch = path.with_name(f"{path.name}.new")
    scratch.write_text(text + "".join(f"{line}\n" for line in lines))
    os.replace(scratch, path)  # noqa: PTH105 - the name says it
    return path
