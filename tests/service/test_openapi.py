"""The OpenAPI document and the service are of one mind: schemathesis asks whatever the document allows."""

from __future__ import annotations

import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from service.keys import new_key
from tests.service.conftest import listening_in_a_thread

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.service.conftest import MakeSettings, StandInWorker

ASKED = 12
"""Generated requests an operation in the phases of fuzzing; `st run` by hand takes as many as wanted."""
CONFIG = """
# Of these no schema can say which bytes are a picture, or which fields go together: a refusal is in order.
[[operations]]
include-name = ["POST /v1/answer", "POST /v1/chat/completions", "POST /v1/media"]
checks.positive_data_acceptance.expected-statuses = ["2xx", 400, 404, 413, 415, 422]

# Any reader of events is sent a Last-Event-ID of 0, whatever pattern the document gives.
[[operations]]
include-name = "GET /v1/jobs/{job_id}/events"
checks.positive_data_acceptance.expected-statuses = ["2xx", 404, 422]
"""
BEAT_S = 2.0


@contextmanager
def beating(worker: StandInWorker) -> Iterator[None]:
    """The worker is seen for as long as it takes."""
    over = threading.Event()

    def beat() -> None:
        while not over.wait(BEAT_S):
            worker.beat()

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def test_the_service_is_what_its_document_says(
    make_settings: MakeSettings, worker: StandInWorker, tmp_path: Path
) -> None:
    """All of schemathesis' checks: statuses, types, headers, bodies, keys, refusals, and never a 5xx."""
    key, line = new_key("schemathesis")
    settings = make_settings(api_keys=(line,), rate_per_minute=0, timeout_s=0.2, max_timeout_s=0.2)
    config = tmp_path / "schemathesis.toml"
    config.write_text(CONFIG)
    with beating(worker), listening_in_a_thread(settings) as port:
        st = [str(Path(sys.executable).with_name("st")), f"--config-file={config}"]
        command = [*st, "run", f"http://127.0.0.1:{port}/openapi.json", "--checks=all"]
        options = ["--seed=1", "--generation-deterministic", f"--max-examples={ASKED}", "--no-color"]
        done = subprocess.run(
            [*command, *options, "-H", f"Authorization: Bearer {key}"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
            timeout=600,
        )
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-2000:]
