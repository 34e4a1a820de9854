"""What one start needs of the machine: ports that are free and a directory that is nobody else's."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from typing import TYPE_CHECKING

from service.serve.errors import DataDirectoryError, PortInUseError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

LOOPBACK = "127.0.0.1"


def require_free_port(host: str, port: int) -> None:
    """Raise PortInUseError now rather than let the front end find out after a minute of loading."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.create_server((host, port), family=family):
            return
    except OSError as error:
        raise PortInUseError(host, port, error.strerror or str(error)) from error


def free_ports(count: int) -> list[int]:
    """`count` different loopback ports that nothing listens on at this moment."""
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.create_server((LOOPBACK, 0))) for _ in range(count)]
        return [each.getsockname()[1] for each in sockets]


@contextlib.contextmanager
def claim(directory: Path) -> Iterator[None]:
    """Hold `directory` for this process: the system lets go of it however the process ends.

    Raises DataDirectoryError when another process holds it or it cannot be written.
    """
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = (directory / "lock").open("a+")
    except OSError as error:
        raise DataDirectoryError(f"{directory} cannot be written: {error.strerror}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.seek(0)
            owner = lock.read().strip()
            raise DataDirectoryError(f"Process {owner} already serves from {directory}") from error
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield
