"""A tree of child processes that lives and dies together. It knows nothing of what the children do."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from asyncio.subprocess import DEVNULL, PIPE, STDOUT, Process
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from service.serve import guard
from service.serve.errors import ChildFailedError

if TYPE_CHECKING:
    from collections.abc import Coroutine, Mapping
    from pathlib import Path
    from types import TracebackType

TAIL_BYTES = 4096
ECHO_S = 1.0
"""One wish to stop may arrive twice: `make` passes on a signal that the whole process group got as well."""


@dataclass(frozen=True)
class Command:
    """One child: what to run, and how.

    Its output goes to the file `log` (None: to this terminal). After SIGTERM it has `patience_s` seconds.
    """

    name: str
    argv: tuple[str, ...]
    environment: Mapping[str, str] | None = None
    stdin: bytes = b""
    log: Path | None = None
    patience_s: float = 10.0


class ProcessTree:
    """Starts children one after the other; leaving the `async with` ends them in the opposite order.

    Every child leads a process group of its own: what it started goes with it, and a Ctrl-C in the
    terminal reaches only the supervisor, which keeps the order. When a child ends by itself `supervise`
    raises; when the supervisor is killed, the guard process kills the children.
    """

    def __init__(self) -> None:
        self._children: list[tuple[Command, Process]] = []
        self._watchers: list[asyncio.Task[None]] = []
        self._stopping = False
        self._interrupted_at: float | None = None
        self._hurry = asyncio.Event()
        self._ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def __aenter__(self) -> Self:
        # Isolated and without site-packages: the guard needs the standard library and nothing else.
        argv = (sys.executable, "-I", "-S", guard.__file__)
        self._guard = await asyncio.create_subprocess_exec(*argv, stdin=PIPE, start_new_session=True)
        self._watch(Command("guard", argv), self._guard)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopping = True
        while self._children:
            await self._stop(*self._children[-1])
        if self._guard.stdin:
            self._guard.stdin.close()  # with no group left it just ends
        await asyncio.gather(*self._watchers)

    def interrupt(self) -> None:
        """Ask the tree to end; asked a second time, it stops waiting for children that take long."""
        now = time.monotonic()
        if self._interrupted_at is None:
            self._interrupted_at = now
        elif now - self._interrupted_at > ECHO_S:
            self._hurry.set()
        if not self._ended.done():
            self._ended.set_result(None)

    async def supervise(self, start_up: Coroutine[object, object, None]) -> None:
        """Run `start_up`, then wait for `interrupt`.

        Raises what `start_up` raises, and ChildFailedError as soon as a child has ended by itself.
        """
        task = asyncio.create_task(start_up)
        await asyncio.wait({task, self._ended}, return_when=asyncio.FIRST_COMPLETED)
        if self._ended.done():
            task.cancel()
            await asyncio.wait({task})
        else:
            await task
        await self._ended

    async def start(self, command: Command) -> None:
        """Start a child that is to live as long as the tree."""
        self._watch(command, await self._spawn(command))

    async def run(self, command: Command) -> None:
        """Run a child to its end. Raises ChildFailedError if its exit code is not 0."""
        process = await self._spawn(command)
        if await process.wait():
            raise _failure(command, process)
        self._forget(command, process)

    async def _spawn(self, command: Command) -> Process:
        with contextlib.ExitStack() as closing:
            log = closing.enter_context(command.log.open("wb")) if command.log else None
            process = await asyncio.create_subprocess_exec(
                *command.argv,
                stdin=PIPE if command.stdin else DEVNULL,
                stdout=log,
                stderr=STDOUT if log else None,
                env=command.environment,
                start_new_session=True,
            )
        self._children.append((command, process))
        self._tell_guard("+", process)
        if process.stdin:
            process.stdin.write(command.stdin)
            process.stdin.close()
        return process

    def _watch(self, command: Command, process: Process) -> None:
        async def watch() -> None:
            await process.wait()
            if not self._stopping and not self._ended.done():
                self._ended.set_exception(_failure(command, process))

        self._watchers.append(asyncio.create_task(watch()))

    async def _stop(self, command: Command, process: Process) -> None:
        """SIGTERM and patience for the child, then SIGKILL for it and for all that it left behind."""
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        waits = [asyncio.create_task(process.wait()), asyncio.create_task(self._hurry.wait())]
        await asyncio.wait(waits, timeout=command.patience_s, return_when=asyncio.FIRST_COMPLETED)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await waits[0]
        waits[1].cancel()
        self._forget(command, process)

    def _forget(self, command: Command, process: Process) -> None:
        self._children.remove((command, process))
        self._tell_guard("-", process)

    def _tell_guard(self, sign: str, process: Process) -> None:
        if self._guard.stdin:
            self._guard.stdin.write(f"{sign}{process.pid}\n".encode())


def _failure(command: Command, process: Process) -> ChildFailedError:
    tail = ""
    if command.log:
        lines = command.log.read_bytes()[-TAIL_BYTES:].decode(errors="replace").splitlines()
        tail = "\n".join(f"  {line}" for line in lines[-20:])
    return ChildFailedError(command.name, process.returncode or 0, tail)
