"""Who runs beside whom: many jobs together, or one suspect by itself."""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


class Company:
    """Jobs share the process, until one has to be alone in it: if the process dies then, it was that one.

    Who wants to be alone goes before those who do not mind company, or would never have its turn.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._members = 0
        self._waiting_alone = 0
        self._alone = False

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Beside others, once nobody is alone or waits to be."""
        with self._changed:
            self._changed.wait_for(lambda: not (self._alone or self._waiting_alone))
            self._members += 1
        try:
            yield
        finally:
            with self._changed:
                self._members -= 1
                self._changed.notify_all()

    @contextmanager
    def alone(self, until: float) -> Iterator[None]:
        """By itself, once the others have left; in company after all when `until` (monotonic) has passed."""
        with self._changed:
            self._waiting_alone += 1
            try:
                free = self._changed.wait_for(
                    lambda: not (self._alone or self._members),
                    min(max(0.0, until - time.monotonic()), threading.TIMEOUT_MAX),
                )
            finally:
                self._waiting_alone -= 1
            self._alone = self._alone or free
            self._changed.notify_all()
        try:
            yield
        finally:
            if free:
                with self._changed:
                    self._alone = False
                    self._changed.notify_all()
