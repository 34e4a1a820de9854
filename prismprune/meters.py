"""What a request costs: time on the device's own clock, and the peak of its memory."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import psutil
import torch

if TYPE_CHECKING:
    from torch import device as Device  # noqa: N812 (a type, so written like one)


@dataclass(frozen=True, slots=True)
class Lap:
    """From one point in time to the next: seconds, or events of a CUDA stream, which it is yet to reach."""

    begin: Any
    end: Any

    @property
    def ms(self) -> float:
        """How long it took, in milliseconds. On CUDA this waits for its end."""
        if isinstance(self.begin, torch.cuda.Event):
            self.end.synchronize()
            return float(self.begin.elapsed_time(self.end))
        return float(self.end - self.begin) * 1000


class Stopwatch:
    """Splits a stretch of work into laps. CUDA's calls return before their work is done: there by its clock.

    That of the current stream: what another thread has given to one of its own does not count.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._last = self._now()

    def lap(self) -> Lap:
        """Since the last one, or the start. Waits for nothing yet: there may be more to give to CUDA."""
        last, self._last = self._last, self._now()
        return Lap(last, self._last)

    def lap_ms(self) -> float:
        """Its milliseconds, once its work is done."""
        return self.lap().ms

    def _now(self) -> float | torch.cuda.Event:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event


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
