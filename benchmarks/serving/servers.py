"""The servers that are compared: how one is started, watched and ended. It knows none of them by name."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, Self

import httpx
import psutil

from benchmarks._measure import forget_resident_peak, resident_bytes
from service.serve import guard
from service.serve.machine import LOOPBACK, free_ports

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

START_S = 1800
"""vLLM compiles for minutes, and for many more where the machine is busy."""
PATIENCE_S = 30
"""For a server to end after SIGTERM, before its whole process group is killed."""
READY_S = 60
"""For a server that was stopped for a while to hear from its own parts again."""
REST_S, REST_WITHIN_S = 0.5, 10.0
BUSY = 0.1
"""Of a core, at rest: heartbeats and the like."""
TAIL = 30
"""Lines of the log of a server that did not start."""


@dataclass(frozen=True)
class Launch:
    """A server's command line, what it needs in its environment, and where it says that it is ready."""

    command: tuple[str, ...]
    environment: Mapping[str, str]
    health: str


class Rival(Protocol):
    """A server that speaks OpenAI's chat completions.

    model: what requests call the model. own: fields that its requests carry beside OpenAI's. streams: whether
    it can send an answer token by token.
    """

    @property
    def name(self) -> str: ...

    @property
    def model(self) -> str: ...

    @property
    def own(self) -> Mapping[str, Any]: ...

    @property
    def streams(self) -> bool: ...

    def launch(self, host: str, port: int) -> Launch:
        """How it is started there."""


@dataclass
class Server:
    """A rival that is ready. health: where it says so."""

    rival: Rival
    url: str
    process: psutil.Process
    health: str = "/"

    def await_readiness(self) -> None:
        """Raises `RuntimeError` if it is not ready again within `READY_S`."""
        until = time.monotonic() + READY_S
        while time.monotonic() < until:
            if _is_healthy(self.url + self.health):
                return
            time.sleep(REST_S)
        raise RuntimeError(f"{self.rival.name} is no longer ready")

    @contextmanager
    def watched(self) -> Iterator[Usage]:
        """Fills what it yields while the block runs."""
        usage = Usage()
        _forget_peaks(self.process)
        before = tree_cpu_s(self.process)
        try:
            yield usage
        finally:
            usage.cpu_s = tree_cpu_s(self.process) - before
            usage.peak_bytes = tree_peak_bytes(self.process)


def at_rest(servers: Sequence[Server]) -> bool:
    """Waits until none of them uses the processors; False if one still does after `REST_WITHIN_S`.

    vLLM looks for work for a second after an answer, on a whole core: that is not the next one's time to pay.
    """
    processes = {server.process.pid: server.process for server in servers}.values()
    until = time.monotonic() + REST_WITHIN_S
    while time.monotonic() < until:
        before = sum(map(tree_cpu_s, processes))
        time.sleep(REST_S)
        if sum(map(tree_cpu_s, processes)) - before <= BUSY * REST_S:
            return True
    return False


@dataclass
class Usage:
    """What a server's processes took: memory at the most, and processor time in all."""

    peak_bytes: int = 0
    cpu_s: float = 0.0


def tree_peak_bytes(root: psutil.Process) -> int:
    """The most memory of a process tree since `_forget_peaks`; what its processes share counts once.

    Their proportional set sizes now, and by how much the resident set of each was once above what it is: an
    upper bound, as not all need be at their most at once. The kernel keeps it. To look at the sizes meanwhile
    would hold up a server of gigabytes by a twentieth of a second each time.
    """
    total = 0
    for process in _tree(root):
        with suppress(psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
            now, peak = resident_bytes(process.pid)
            total += process.memory_full_info().pss + max(0, peak - now)
    return total


def _forget_peaks(root: psutil.Process) -> None:
    """From now on the kernel keeps new peaks of the resident sets of a process tree."""
    for process in _tree(root):
        with suppress(ProcessLookupError, FileNotFoundError):
            forget_resident_peak(process.pid)


def tree_cpu_s(root: psutil.Process) -> float:
    """Processor seconds of a process and all its descendants, those that it has seen end included."""
    total = 0.0
    for process in _tree(root):
        with suppress(psutil.NoSuchProcess):
            total += sum(process.cpu_times()[:4])  # user and system, its own and its ended children's
    return total


def _tree(root: psutil.Process) -> tuple[psutil.Process, ...]:
    return root, *root.children(recursive=True)


def leave_by_sigterm() -> None:
    """Let SIGTERM leave by way of all `with` blocks, which end servers; a second one changes nothing."""

    def leave(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        sys.exit(143)

    signal.signal(signal.SIGTERM, leave)


class Guard:
    """A process that kills the groups that it watches, if this one ends without leaving the block."""

    def __enter__(self) -> Self:
        command = [sys.executable, "-I", "-S", guard.__file__]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True, text=True)  # noqa: S603
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()  # it ends with its input

    def watch(self, group: int) -> None:
        """A process group that is to end, too."""
        self._tell(f"+{group}\n")

    def forget(self, group: int) -> None:
        """One that has ended, or ends by itself."""
        self._tell(f"-{group}\n")

    def _tell(self, line: str) -> None:
        if self._process.stdin is None:
            raise RuntimeError("the guard has no input")
        self._process.stdin.write(line)
        self._process.stdin.flush()


@dataclass
class Keeper:
    """Starts servers; as a context, ends them all. Should this process be killed, a guard process does."""

    threads: int
    logs: Path
    _groups: list[subprocess.Popen[bytes]] = field(default_factory=list)
    _stopped: list[psutil.Process] = field(default_factory=list)
    _guard: Guard = field(default_factory=Guard)

    def __enter__(self) -> Self:
        self.logs.mkdir(parents=True, exist_ok=True)
        self._guard.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._go_on()  # what is stopped ends nothing, neither itself nor its own
        for process in self._groups:
            process.terminate()
        for process in reversed(self._groups):
            with suppress(subprocess.TimeoutExpired):
                process.wait(PATIENCE_S)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            self._guard.forget(process.pid)
        self._guard.__exit__()

    def start(self, rival: Rival) -> Server:
        """A server that is ready. Raises SystemExit, with the end of its log, if it does not become so."""
        (port,) = free_ports(1)
        launch = rival.launch(LOOPBACK, port)
        log = self.logs / f"{log_name(rival.name, port)}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(  # noqa: S603 -- our own server, or one compared with
                launch.command,
                env={**os.environ, "OMP_NUM_THREADS": str(self.threads), **launch.environment},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._groups.append(process)
        self._guard.watch(process.pid)
        url = f"http://{LOOPBACK}:{port}"
        _await_health(process, url + launch.health, log)
        return Server(rival, url, psutil.Process(process.pid), launch.health)

    @contextmanager
    def alone(self, server: Server) -> Iterator[None]:
        """Stops the processes of all other servers while the block runs.

        The threads of an idle server wake up, some of them a hundred times a second, and take a core from
        the one that answers: whoever serves one of them has no other beside it.
        """
        others = [psutil.Process(each.pid) for each in self._groups if each.pid != server.process.pid]
        self._stopped = [process for root in others for process in _tree(root)]
        roots = {each.pid for each in self._groups}
        groups = set[int]()
        for process in self._stopped:
            with suppress(ProcessLookupError):
                groups.add(os.getpgid(process.pid))
        groups -= roots
        for group in groups:  # stopped, they do not notice that what they belong to is gone
            self._guard.watch(group)
        try:
            for process in self._stopped:
                with suppress(psutil.NoSuchProcess):
                    process.suspend()
            yield
        finally:
            self._go_on()
            for group in groups:
                self._guard.forget(group)

    def _go_on(self) -> None:
        for process in self._stopped:
            with suppress(psutil.NoSuchProcess):
                process.resume()
        self._stopped = []


def log_name(name: str, port: int) -> str:
    """Of a server's logs: two with one name have none in common."""
    return f"{name.replace(' ', '-')}-{port}"


def _is_healthy(url: str) -> bool:
    with suppress(httpx.HTTPError):  # not there yet
        return httpx.get(url, timeout=5, trust_env=False).is_success  # a proxy has no way here
    return False


def _await_health(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    until = time.monotonic() + START_S
    while process.poll() is None and time.monotonic() < until:
        if _is_healthy(url):
            return
        time.sleep(0.5)
    raise SystemExit(f"{url} is not served (exit code {process.returncode}):\n{end_of(log)}")


def end_of(log: Path) -> str:
    """Its last lines."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-TAIL:])
