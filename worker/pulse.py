"""The serving process's signs of life, written to its supervisor through a pipe."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Callable

ALIVE, WARM, STALLED = b".", b"w", b"s"
EVERY_S = 1.0


class Pulse:
    """A thread that writes one byte a second until the block ends, and looks after what cannot wait longer.

    `stalled` says whether the engine hangs; `every_second` is called before each byte. `orphaned` is called
    once nobody reads any more: the supervisor was killed, and its successor must not find this process.
    """

    def __init__(
        self,
        pipe: int,
        stalled: Callable[[], bool],
        every_second: Callable[[], None],
        orphaned: Callable[[], None],
    ) -> None:
        self._pipe = pipe
        self._stalled = stalled
        self._every_second = every_second
        self._orphaned = orphaned
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._main, name="pulse", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def warm(self) -> None:
        """Says at once that the model is loaded: a death after this is no failure to start."""
        os.write(self._pipe, WARM)

    def _main(self) -> None:
        while not self._over.is_set():
            self._every_second()
            try:
                os.write(self._pipe, STALLED if self._stalled() else ALIVE)
            except BrokenPipeError:
                self._orphaned()
                return
            self._over.wait(EVERY_S)
