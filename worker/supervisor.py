"""`python -m worker`: a small process without torch that runs the serving one, and replaces it when it dies.

Leaves with 0 after SIGTERM or SIGINT. Where another start would end no better it leaves with 1 if the serving
process says so itself (`EX_GIVE_UP`), and with that one's own code if it died `HOPELESS` times without ever
having been warm.
"""

from __future__ import annotations

import logging
import os
import selectors
import signal
import subprocess
import sys
import time
from collections import deque
from typing import TYPE_CHECKING
from uuid import uuid4

from pydantic import ValidationError
from redis.exceptions import RedisError

from worker.contract import complaints
from worker.jobs import connect, free
from worker.logs import log_to_stderr
from worker.pulse import STALLED, WARM
from worker.settings import WorkerSettings, serving_environment

if TYPE_CHECKING:
    from collections.abc import Sequence

log = logging.getLogger(__name__)

EX_GIVE_UP = 78
"""The serving process's exit code for what no restart mends, a model that cannot be loaded: `EX_CONFIG` of
sysexits.h. Python's own for an error that nobody caught is 1, and such a one, memory that a predecessor still
holds say, may be over at the next start."""
FAILED = 1
"""What the supervisor ends with then."""
BAD_SETTING = 2
"""What the front end ends with, too."""
HOPELESS = 3
MARGIN_S = 3.0
"""Beyond its grace the serving process has so long to give its jobs back, and again so long to leave."""
BACKOFF_S = 0.5
START_S = 300.0
"""A process that imports and loads may be silent for longer than one that serves."""
MINUTE_S = 60.0

SERVE = (sys.executable, "-m", "worker.process")


def main(command: Sequence[str] = SERVE) -> int:
    """Keeps `command` running until told to stop; returns the exit code.

    Its last arguments will be the name of its life and the descriptor of the pipe for its `Pulse`.
    """
    try:
        settings = WorkerSettings()
    except ValidationError as error:
        sys.stderr.write("\n".join((*complaints(error), "")))
        return BAD_SETTING
    log_to_stderr(settings.log_format, settings.log_level)
    return Supervisor(command, settings).run()


class Supervisor:
    """One child at a time. A child that says that its engine stalls, or nothing at all, is killed.

    Each life of a child has a name of its own. The jobs that it held when it died are free at once: nobody
    else can be as sure that nothing works on them any more.
    """

    def __init__(self, command: Sequence[str], settings: WorkerSettings) -> None:
        self._command = command
        self._broker_url, self._model = settings.broker_url, settings.model
        self._silence_s = settings.engine_stall_s
        self._grace_s = settings.grace_s
        self._starts: deque[float] = deque(maxlen=settings.max_restarts_per_minute)
        self._asked_to_stop = False
        self._warm = False

    def run(self) -> int:
        """Starts, watches, starts again."""
        waker = self._catch_signals()
        deaths, backoff_s = 0, BACKOFF_S
        while True:
            self._starts.append(time.monotonic())
            name = uuid4().hex
            code = self._one_life(name, waker)
            if self._warm:
                self._free_jobs(name)
            if self._asked_to_stop:
                return 0
            deaths, backoff_s = (0, BACKOFF_S) if self._warm else (deaths + 1, 2 * backoff_s)
            hopeless = deaths >= HOPELESS or (code == EX_GIVE_UP and not self._warm)
            if code == 0 or hopeless:
                return _own_code(code)
            pause_s = max(backoff_s, self._room_in(MINUTE_S))
            log.error("the serving process ended with code %d; a new one in %.1f s", code, pause_s)
            if self._sleep(waker, pause_s):
                return 0

    def _catch_signals(self) -> int:
        """Signals only write to a pipe, which every wait reads; returns its other end."""
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        for each in (signal.SIGTERM, signal.SIGINT):
            signal.signal(each, self._stop)
        return reader

    def _stop(self, *_: object) -> None:
        self._asked_to_stop = True

    def _one_life(self, name: str, waker: int) -> int:
        """Runs a child to its end; returns its code, negative for a signal."""
        reader, writer = os.pipe()
        try:
            child = subprocess.Popen(  # noqa: S603 - our own command
                [*self._command, name, str(writer)], pass_fds=[writer], env=serving_environment()
            )
        finally:
            os.close(writer)
        self._warm = False
        try:
            self._watch(child, reader, waker)
            return child.wait()
        finally:
            child.kill()
            child.wait()
            os.close(reader)

    def _free_jobs(self, name: str) -> None:
        try:
            held = free(connect(self._broker_url, patient=False), self._model, name)
        except RedisError as error:
            log.warning("its jobs stay leased to it (%s) until that runs out", type(error).__name__)
        else:
            log.info("%d jobs that it held are free", held)

    def _watch(self, child: subprocess.Popen[bytes], reader: int, waker: int) -> None:
        """Returns once the child has ended, by itself or not."""
        with selectors.DefaultSelector() as selector:
            selector.register(reader, selectors.EVENT_READ)
            selector.register(waker, selectors.EVENT_READ)
            while not self._asked_to_stop:
                silence_s = self._silence_s if self._warm else max(START_S, self._silence_s)
                ready = {key.fd for key, _ in selector.select(silence_s)}
                signs = os.read(reader, 4096) if reader in ready else b""
                self._warm = self._warm or WARM in signs
                if STALLED in signs or not ready:
                    log.critical("the serving process %s", "stalls" if signs else "gives no sign of life")
                    self._end_at_once(child)
                    return
                if reader in ready and not signs:  # the pipe's other end is closed: it is gone
                    return
        child.terminate()
        try:
            child.wait(self._grace_s + 2 * MARGIN_S)
        except subprocess.TimeoutExpired:
            log.error("the serving process outlasts its grace and is killed")  # noqa: TRY400 - no news in it
            child.kill()

    def _end_at_once(self, child: subprocess.Popen[bytes]) -> None:
        """SIGABRT first: the child writes where each of its threads is."""
        child.send_signal(signal.SIGABRT)
        try:
            child.wait(MARGIN_S)
        except subprocess.TimeoutExpired:
            child.kill()

    def _room_in(self, seconds: float) -> float:
        """How long to wait until one more start is not too many within `seconds`."""
        full = len(self._starts) == self._starts.maxlen
        return max(0.0, self._starts[0] + seconds - time.monotonic()) if full else 0.0

    def _sleep(self, waker: int, seconds: float) -> bool:
        """True if a signal ended the pause."""
        with selectors.DefaultSelector() as selector:
            selector.register(waker, selectors.EVENT_READ)
            selector.select(seconds)
        return self._asked_to_stop


def _own_code(code: int) -> int:
    """The supervisor's exit code for the serving process's, which is negative for a signal."""
    if code == EX_GIVE_UP:
        return FAILED
    return code if code >= 0 else 128 - code
