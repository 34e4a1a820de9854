"""Lines of logs: what they say, and above all what they do not."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tests.worker.conftest import stored
from worker.logs import REQUEST_ID, JsonLines, TextLines, without_content

if TYPE_CHECKING:
    from pathlib import Path

    from tests.worker.conftest import MakeJob, Worker

SECRET = "the-" + "quick-brown-fox"


def failed() -> BaseException:
    """An error that quotes what a caller said, as does the one that caused it."""

    def fail() -> None:
        try:
            int(SECRET)
        except ValueError as error:
            raise RuntimeError(SECRET) from error

    with pytest.raises(RuntimeError) as raised:
        fail()
    return raised.value


def record(error: BaseException | None = None) -> logging.LogRecord:
    info = (type(error), error, error.__traceback__) if error else None
    return logging.LogRecord("service.x", logging.ERROR, __file__, 1, "%s\nwent", ("it",), info)


def test_errors_are_told_without_their_messages() -> None:
    """Types and stacks of the whole chain; the messages may quote a question."""
    told = without_content(failed())
    assert "ValueError" in told
    assert "RuntimeError" in told
    assert "test_logs.py" in told
    assert SECRET not in told


@pytest.mark.parametrize("formatter", [TextLines(), JsonLines()])
def test_no_formatter_lets_a_message_of_an_error_through(formatter: logging.Formatter) -> None:
    """Whoever logs it, a library included."""
    line = formatter.format(record(failed()))
    assert "RuntimeError" in line
    assert SECRET not in line


def test_a_json_line_is_one_line_with_the_requests_id() -> None:
    """Line breaks in messages are escaped; outside of a request the id is a dash."""
    line = JsonLines().format(record())
    assert "\n" not in line
    parsed = json.loads(line)
    assert (parsed["level"], parsed["message"], parsed["request_id"]) == ("error", "it\nwent", "-")
    token = REQUEST_ID.set("req_1")
    try:
        assert json.loads(JsonLines().format(record()))["request_id"] == "req_1"
        assert "[req_1]" in TextLines().format(record())
    finally:
        REQUEST_ID.reset(token)


async def test_a_thread_that_works_for_a_request_logs_its_id() -> None:
    """Media are measured in threads."""
    REQUEST_ID.set("req_2")
    line = await asyncio.to_thread(JsonLines().format, record())
    assert json.loads(line)["request_id"] == "req_2"


class Told(logging.Handler):
    """Keeps lines as they would be written, in the thread that writes them."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(JsonLines())
        self.lines: list[dict[str, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(json.loads(self.format(record)))


def test_a_jobs_lines_have_its_requests_id(
    worker: Worker, make_job: MakeJob, media_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its end, and what the thread that decodes its media says; the thread's next job has its own."""

    def decode(*_: object) -> None:
        logging.getLogger("worker.store").warning("slow")
        raise OSError(SECRET)

    first = make_job(media=(stored(media_url, b"one"),), request_id="req_1")
    second = make_job(request_id="req_2")
    log = logging.getLogger("worker")
    log.addHandler(told := Told())
    monkeypatch.setattr(log, "level", logging.INFO)
    try:
        with monkeypatch.context() as patch:
            patch.setattr("worker.tasks.decode", decode)
            worker.run(first)
        worker.run(second)
    finally:
        log.removeHandler(told)
    said = [(each["request_id"], each["message"].split()[0]) for each in told.lines]
    assert said == [("req_1", "slow"), ("req_1", "job"), ("req_1", "job"), ("req_2", "job")]
    assert first.id in told.lines[1]["message"]
    assert SECRET not in str(told.lines)
    assert REQUEST_ID.get() == "-"


def test_a_worker_writes_json_if_told(tmp_path: Path) -> None:
    """Every line of the process and of what it loads with; there is neither a model here nor a broker."""
    environment = {
        **os.environ,
        "PRISM_LOG_FORMAT": "json",
        "PRISM_MODEL": str(tmp_path),
        "PRISM_MEDIA_URL": tmp_path.as_uri(),
        "PRISM_BROKER_URL": "redis://127.0.0.1:1/0",
        "PRISM_METRICS_PORT": "0",
    }
    done = subprocess.run(
        [sys.executable, "-m", "worker"], env=environment, capture_output=True, text=True, check=False
    )
    lines = [json.loads(each) for each in done.stderr.splitlines()]
    assert done.returncode == 1
    assert "__main__" in {each["logger"] for each in lines}
