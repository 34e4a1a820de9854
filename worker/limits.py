"""How much memory a worker may use: what its peaks are measured against."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import torch

if TYPE_CHECKING:
    from torch import device as Device  # noqa: N812 (a type, so written like one)

CGROUP = Path("/sys/fs/cgroup")
"""A container sees its own here, in version 2 as in version 1."""
LIMIT_FILES = ("memory.max", "memory/memory.limit_in_bytes")


def memory_limit_bytes(device: Device, cgroup: Path = CGROUP) -> int:
    """All of the device's memory on CUDA; elsewhere the machine's, or the container's where that is less."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    limits = [int(psutil.virtual_memory().total)]
    for name in LIMIT_FILES:
        try:
            limits.append(int((cgroup / name).read_text()))
        except (OSError, ValueError):  # no such file, or `max`
            continue
    return min(limits)
