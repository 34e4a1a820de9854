"""Why `make serve` ends without having been asked to. Each message is written for the terminal."""

from __future__ import annotations


class ServeError(Exception):
    """`make serve` cannot go on."""


class PortInUseError(ServeError):
    def __init__(self, host: str, port: int, reason: str) -> None:
        super().__init__(
            f"Port {port} on {host} cannot be used: {reason}.\n"
            f"Stop what listens there, or take another port: PRISM_PORT={port + 1} make serve"
        )


class UnguardedError(ServeError):
    """The front end would listen beyond loopback without keys."""


class DataDirectoryError(ServeError):
    def __init__(self, problem: str) -> None:
        super().__init__(
            f"{problem}.\n"
            "Stop that process, or take another directory and port: "
            "PRISM_DATA_DIR=<directory> PRISM_PORT=<port> make serve"
        )


class ChildFailedError(ServeError):
    """A process of the tree ended although nobody had asked it to."""

    def __init__(self, name: str, exit_code: int, log_tail: str) -> None:
        how = f"was killed by signal {-exit_code}" if exit_code < 0 else f"ended with code {exit_code}"
        shown = f" Its last lines:\n{log_tail}" if log_tail else ""
        super().__init__(f"The {name} {how}, so everything is stopped.{shown}")
