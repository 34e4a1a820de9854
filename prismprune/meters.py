"""What a request costs: time on the device's own clock, and the peak of its memory."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import psutil
import torch

if TYPE_CHECKING:
    from torch import device as Device  # noqa: N812 (a type, so written like one)


class Stopwatch:
    """Splits a stretch of work into laps. Waits for CUDA, whose calls return before their work is done.

    What another thread has given to a stream of its own is not waited for.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._last = self._now()

    def lap_ms(self) -> float:
        """Milliseconds since the last lap, or since the start."""
        last, self._last = self._last, self._now()
        return (self._last - last) * 1000

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        return time.perf_counter()


def memory_bytes(device: Device) -> int:
    """Memory in use now, in bytes: allocated on CUDA, resident elsewhere."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return int(psutil.Process().memory_info().rss)


class PeakMemory:
    """Highest `memory_bytes` since its making. On CUDA exact; elsewhere what the samples saw."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._peak = memory_bytes(device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def sample(self) -> int:
        """Look now; returns the peak so far, in bytes."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        self._peak = max(self._peak, memory_bytes(self._device))
        return self._peak

    def lap(self) -> int:
        """The peak since the last lap, or since its making, in bytes; the next lap begins."""
        peak = self.sample()
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        self._peak = memory_bytes(self._device)
        return peak
