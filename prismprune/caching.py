"""Encoded media, and what prompts that show them begin with, to use again.

The selection reads no question, so one encoding serves them all. It answers for its own budget alone: `prism`
is not nested. Its salient tokens at a smaller budget are among those at a larger one, but the pool that the
diverse ones are chosen from depends on the budget.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from prismprune.encoding import EncodedMedia

if TYPE_CHECKING:
    from collections.abc import Hashable

    from prismprune.batches import Prefix


class Sized(Protocol):
    """What knows its size."""

    @property
    def bytes(self) -> int:
        """What it takes of the device's memory."""


S = TypeVar("S", bound=Sized)


class ByteCache(Generic[S]):
    """At most `max_bytes`, the entries unused for longest dropped first. Any thread may use it."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._entries: OrderedDict[Hashable, S] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    @property
    def bytes(self) -> int:
        """What the entries take of the device's memory."""
        return self._bytes

    def get(self, key: Hashable) -> S | None:
        """The entry of that key, which is now the one used last."""
        with self._lock:
            if key in self._entries:
                self._entries.move_to_end(key)
            return self._entries.get(key)

    def takes(self, size: int) -> bool:
        """Whether an entry of so many bytes would be kept."""
        return size <= self._max_bytes

    def put(self, key: Hashable, entry: S) -> None:
        """Keep `entry`, unless it alone is larger than the cache."""
        if not self.takes(entry.bytes):
            return
        with self._lock:
            if (before := self._entries.pop(key, None)) is not None:
                self._bytes -= before.bytes
            self._entries[key] = entry
            self._bytes += entry.bytes
            while self._bytes > self._max_bytes:
                self._bytes -= self._entries.popitem(last=False)[1].bytes

    def clear(self) -> None:
        """Drop all."""
        with self._lock:
            self._entries.clear()
            self._bytes = 0


class EncodingCache(ByteCache[EncodedMedia]):
    """At most `max_bytes` of visual tokens, with the timings of when they were made.

    A key has to tell apart all that decides an encoding: the media's content and how it was sampled, the
    budget, the method and its options.

    prefixes: at most `prefix_bytes` of the keys and values of prompts, from their first token to their last
    visual one, and of the texts before media that come again; None for 0 bytes. A further question about
    cached media then has only its own words prefilled, and one after a known text no more than what follows.
    """

    def __init__(self, max_bytes: int, prefix_bytes: int = 0) -> None:
        super().__init__(max_bytes)
        self.prefixes: ByteCache[Prefix] | None = ByteCache(prefix_bytes) if prefix_bytes else None

    @property
    def bytes(self) -> int:
        """What the entries take of the device's memory, the prefixes too."""
        return super().bytes + (self.prefixes.bytes if self.prefixes is not None else 0)

    def clear(self) -> None:
        """Drop all, the prefixes too."""
        super().clear()
        if self.prefixes is not None:
            self.prefixes.clear()
