"""One trace through the real processes: from HTTP through the queue into the engine's stages."""

from __future__ import annotations

import io
from itertools import pairwise
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import httpx
import pytest
from PIL import Image

from tests.collector import Collector, Sent, collecting
from tests.e2e.conftest import Tree, serving, wait_until
from tests.prismprune.tiny import PATCHES
from worker.contract import queue_name

if TYPE_CHECKING:
    from collections.abc import Iterator

CALLER = "b7ad6b7169203331"
"""The span in which the callers of these tests ask."""
QUESTION = "Where did she hide the emerald?"
STAGES = ("decode", "wait", "preprocess", "vision", "select", "prefill", "generate")


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with collecting() as running:
        yield running


@pytest.fixture(scope="module")
def tree(checkpoint: str, collector: Collector, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tree]:
    """`make serve` with traces on; spans are sent every 50 ms."""
    with serving(
        tmp_path_factory.mktemp("serve"),
        PRISM_MODEL=checkpoint,
        PRISM_TRACING_ENDPOINT=collector.url,
        OTEL_BSP_SCHEDULE_DELAY="50",
    ) as running:
        yield running


def asked(tree: Tree, trace: str) -> dict[str, Any]:
    """The answer to a question about a new picture, asked in a trace that the caller has begun."""
    picture = io.BytesIO()
    Image.new("RGB", (40, 40), f"#{trace[:6]}").save(picture, "PNG")
    response = httpx.post(
        f"{tree.url}/v1/answer?note=emerald",
        data={"question": QUESTION, "token_budget": "8", "max_new_tokens": "4"},
        files={"image": picture.getvalue()},
        headers={"traceparent": f"00-{trace}-{CALLER}-01", "X-Request-Id": f"req-{trace}"},
        timeout=60,
        trust_env=False,
    )
    assert response.status_code == 200, response.text
    body: dict[str, Any] = response.json()
    return body


def spans_of(collector: Collector, trace: str) -> dict[str, Sent]:
    """By name, once both processes have sent the last of theirs."""

    def found() -> dict[str, Sent]:
        return {span.name: span for span in collector.spans if span.trace == trace}

    last = ("POST", "process")
    wait_until(lambda: all(any(name.startswith(each) for name in found()) for each in last))
    return found()


def test_one_trace_leads_from_http_through_the_queue_into_the_stages(
    tree: Tree, collector: Collector, checkpoint: str
) -> None:
    """The caller's trace goes on: request, sending, queue, attempt, and the stages one after the other."""
    trace, queue = uuid4().hex, queue_name(checkpoint)
    asked(tree, trace)
    found = spans_of(collector, trace)
    outer = {"POST /v1/answer", f"send {queue}", "queue", f"process {queue}"}
    assert found.keys() == outer | set(STAGES)
    request, sending, attempt = found["POST /v1/answer"], found[f"send {queue}"], found[f"process {queue}"]
    assert (request.parent, sending.parent, attempt.parent) == (CALLER, request.id, sending.id)
    assert (request.service, attempt.service) == ("prismprune-service", "prismprune-worker")
    assert found["queue"].parent == sending.id
    assert request.began <= found["queue"].began <= found["queue"].ended <= attempt.began
    stages = [found[name] for name in STAGES]
    assert all(span.parent == attempt.id and span.began < span.ended for span in stages)
    assert all(before.ended <= after.began for before, after in pairwise(stages))
    assert attempt.began <= stages[0].began
    assert stages[-1].ended <= attempt.ended


def test_the_attempt_tells_what_was_asked_and_what_was_kept(
    tree: Tree, collector: Collector, checkpoint: str
) -> None:
    """Budget, method, tokens before and after pruning; the request's id on each side of the queue."""
    trace = uuid4().hex
    body = asked(tree, trace)
    found = spans_of(collector, trace)
    assert {
        "prismprune.token_budget": 8,
        "prismprune.method": "prism",
        "prismprune.visual_tokens.original": PATCHES,
        "prismprune.visual_tokens.kept": 8,
        "prismprune.request_id": f"req-{trace}",
        "prismprune.state": "succeeded",
        "messaging.message.id": body["id"],
        "gen_ai.usage.input_tokens": body["usage"]["prompt_tokens"],
        "gen_ai.usage.output_tokens": body["usage"]["completion_tokens"],
    }.items() <= found[f"process {queue_name(checkpoint)}"].attributes.items()
    assert found["POST /v1/answer"].attributes == {
        "prismprune.request_id": f"req-{trace}",
        "http.request.method": "POST",
        "http.route": "/v1/answer",
        "http.response.status_code": 200,
    }


def test_no_word_of_the_caller_is_in_the_spans(tree: Tree, collector: Collector) -> None:
    """Neither the question, nor a query string that repeats it, nor a byte of the picture."""
    trace = uuid4().hex
    asked(tree, trace)
    spans_of(collector, trace)
    assert trace.encode() in collector.bodies
    assert b"emerald" not in collector.bodies
    assert b"IHDR" not in collector.bodies
