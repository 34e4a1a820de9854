"""The real process tree of `make serve` on a free port, with data of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest

from service.serve.machine import free_ports
from tests.prismprune.tiny import save_tiny_llava

if TYPE_CHECKING:
    import signal
    from collections.abc import Callable, Iterator, Sequence

ROOT = Path(__file__).parents[2]


def wait_until(condition: Callable[[], bool], within_s: float = 60) -> None:
    """A hang becomes a failure, a slow machine does not."""
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.05)


@dataclass(frozen=True)
class Tree:
    """A running `python -m service.serve`."""

    process: subprocess.Popen[bytes]
    port: int
    terminal: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def printed(self) -> str:
        return self.terminal.read_text()

    @property
    def family(self) -> list[psutil.Process]:
        """Everything that the supervisor started, at any depth."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def member(self, words: str) -> psutil.Process:
        """The one child that has `words` on its command line."""
        (found,) = (each for each in self.family if words in " ".join((*each.cmdline(), "")))
        return found

    def end(self, signal_number: signal.Signals) -> int:
        """Exit code after `signal_number`; asserts that nothing is left running."""
        family = self.family
        self.process.send_signal(signal_number)
        return self.ended(family)

    def ended(self, family: list[psutil.Process]) -> int:
        code = self.process.wait(60)
        wait_until(lambda: not any(alive(each) for each in family))
        return code


def alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@contextmanager
def serving(
    directory: Path,
    *,
    until: str = "Ctrl-C stops",
    within_s: float = 240,
    wrapper: Sequence[str] = (),
    options: Sequence[str] = (),
    **environment: str,
) -> Iterator[Tree]:
    """A tree that has printed `until`; ended at the latest when the block is left."""
    (port,) = free_ports(1)
    terminal = directory / "terminal"
    variables = {"PRISM_DATA_DIR": str(directory / "data"), "PRISM_PORT": str(port), **environment}
    with terminal.open("wb") as output:
        process = subprocess.Popen(
            [*wrapper, sys.executable, "-m", "service.serve", *options],
            cwd=ROOT,
            env={**os.environ, **variables},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    tree = Tree(process, port, terminal)
    try:
        wait_until(lambda: until in tree.printed or process.poll() is not None, within_s)
        assert process.poll() is None, tree.printed
        yield tree
    finally:
        process.terminate()
        process.wait(60)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny random LLaVA on disk: 16 visual tokens a picture."""
    return str(save_tiny_llava(tmp_path_factory.mktemp("checkpoint"), tower="dinov2"))
