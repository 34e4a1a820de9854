"""A vision tower on few views, read as far as its output is used."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from prismprune.attention import BlockReading
from prismprune.replay.recording import Record, Recordings, recorded

if TYPE_CHECKING:
    from torch import Tensor

MOST_VIEWS = 8
"""More keep the device busy for as long as launching takes."""
MOST_RECORDINGS = 16
Read = Callable[["Tensor"], BlockReading]


class _Tower:
    """Pixels [B, 3, height, width] that stay where they are, and what was read of them."""

    def __init__(self, read: Read, values: Tensor) -> None:
        self._read = read
        self.values = values.clone()
        self.reading: BlockReading | None = None
        self.replay: Callable[[], None] = self.run

    @property
    def bytes(self) -> int:
        """What goes in and what comes out."""
        found = self.reading
        read = () if found is None else (found.hidden, found.query, found.keys)
        return sum(tensor.nbytes for tensor in (self.values, *read))

    def run(self) -> None:
        self.reading = self._read(self.values)


class TowerReplay:
    """Recorded readings of towers whose kernels depend on their pixels' shape alone. One thread at a time."""

    def __init__(self, record: Record = recorded) -> None:
        # Whoever reads next may write where this reading is, which is copied by then.
        self.recordings: Recordings[Any, _Tower] = Recordings(record, most=MOST_RECORDINGS, patience=2)

    @property
    def bytes(self) -> int:
        """What pixels and readings take; beside them all recordings share the memory that they work in."""
        return sum(tower.bytes for tower in self.recordings)

    def clear(self) -> None:
        """Give up all memory; what is wanted again is recorded again."""
        self.recordings.clear()

    def read(self, tower: Any, values: Tensor, read: Read) -> BlockReading:
        """What `read` says of `values`, in tensors that are the caller's."""
        if len(values) > MOST_VIEWS:
            return read(values)
        # One encoding at a time reads, and it has ended before the next begins, in whichever stream that is.
        known = self.recordings.find((id(tower), values.shape), partial(_Tower, read, values))
        if known is None:
            return read(values)
        known.values.copy_(values)
        known.replay()
        if known.reading is None:
            raise RuntimeError("a tower was recorded and not read")
        return known.reading.copied()
