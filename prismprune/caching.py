"""Encoded media to use again: the selection reads no question, so one encoding serves them all.

An encoding answers for its own budget alone. `prism` is not nested: its salient tokens at a smaller budget
are among those at a larger one, but the pool that the diverse ones are chosen from depends on the budget.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Hashable

    from prismprune.encoding import EncodedMedia


class EncodingCache:
    """At most `max_bytes` of visual tokens, those unused for longest dropped first. Any thread may use it.

    A key has to tell apart all that decides an encoding: the media's content and how it was sampled, the
    budget, the method and its options.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._entries: OrderedDict[Hashable, EncodedMedia] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    @property
    def bytes(self) -> int:
        """What the entries take of the device's memory."""
        return self._bytes

    def get(self, key: Hashable) -> EncodedMedia | None:
        """The encoding of that key, with the timings of when it was made."""
        with self._lock:
            if key in self._entries:
                self._entries.move_to_end(key)
            return self._entries.get(key)

    def put(self, key: Hashable, encoded: EncodedMedia) -> None:
        """Keep `encoded`, unless it alone is larger than the cache."""
        if encoded.bytes > self._max_bytes:
            return
        with self._lock:
            if (before := self._entries.pop(key, None)) is not None:
                self._bytes -= before.bytes
            self._entries[key] = encoded
            self._bytes += encoded.bytes
            while self._bytes > self._max_bytes:
                self._bytes -= self._entries.popitem(last=False)[1].bytes
