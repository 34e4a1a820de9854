"""The OpenAPI document and the service are of one mind: schemathesis asks whatever the document allows."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from pydantic import ValidationError

from service.app import create_app
from service.keys import new_key
from service.settings import ServiceSettings
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


DESCRIBED = (
    "AnswerItem",
    "AnswerRequest",
    "AnswerResult",
    "FrameSampling",
    "JobView",
    "Memory",
    "PrismOptions",
    "ProblemDetails",
    "PromptTokensDetails",
    "StoredMedia",
    "Timings",
    "TokenMapPart",
    "Usage",
    "VisualTokens",
)


def test_every_field_of_a_question_and_its_answer_is_described(make_settings: MakeSettings) -> None:
    """By words of its own, or by those of the model that it refers to."""
    schemas = create_app(make_settings()).openapi()["components"]["schemas"]

    def described(field: dict[str, str]) -> bool:
        return bool(field.get("description") or schemas[field["$ref"].rpartition("/")[2]].get("description"))

    for model in DESCRIBED:
        bare = [name for name, field in schemas[model]["properties"].items() if not described(field)]
        assert not bare, (model, bare)


def test_times_and_sizes_have_their_units(make_settings: MakeSettings) -> None:
    """Milliseconds, Unix seconds, and seconds, in the words beside the fields."""
    schemas = create_app(make_settings()).openapi()["components"]["schemas"]
    assert "Milliseconds" in schemas["Timings"]["description"]
    for name in ("created_at", "started_at", "finished_at"):
        assert "Unix seconds" in schemas["JobView"]["properties"][name]["description"]
    for name in ("timeout_s", "deadline_s"):
        assert "seconds" in schemas["AnswerRequest"]["properties"][name]["description"]


def test_the_most_of_a_list_is_in_the_document(make_settings: MakeSettings) -> None:
    """What no setting can allow more of."""
    fields = create_app(make_settings()).openapi()["components"]["schemas"]["AnswerRequest"]["properties"]
    most = {"images": "max_images", "questions": "max_questions"}
    for name, setting in most.items():
        assert fields[name]["anyOf"][0]["maxItems"] == ServiceSettings.model_fields[setting].default
        with pytest.raises(ValidationError):
            make_settings(**{setting: fields[name]["anyOf"][0]["maxItems"] + 1})


def test_no_route_promises_an_error_that_is_never_sent(make_settings: MakeSettings) -> None:
    """FastAPI's own 422: where parameters are refused it is with a problem, and any text is an id."""
    document = create_app(make_settings()).openapi()
    assert "HTTPValidationError" not in json.dumps(document)
    for path in ("/v1/jobs/{job_id}", "/v1/models/{model}"):
        for operation in document["paths"][path].values():
            assert "422" not in operation["responses"]
    assert "422" in document["paths"]["/v1/answer"]["post"]["responses"]


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
