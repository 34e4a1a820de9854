"""Traces of the front end: what becomes a span, what the job carries, what happens without a collector."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from typing import TYPE_CHECKING, Any

import pytest
from pydantic import ValidationError

from service import tracing
from tests.collector import Collector, collecting
from tests.service.conftest import question, serving
from worker import contract

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.service.conftest import MakeSettings, StandInWorker

SERVER = 2
"""`SPAN_KIND_SERVER` of OTLP."""


@pytest.fixture
def collector() -> Iterator[Collector]:
    with collecting() as running:
        yield running


async def test_a_job_carries_the_way_back_to_its_trace(
    make_settings: MakeSettings, worker: StandInWorker, collector: Collector
) -> None:
    """As W3C writes it: the trace, and the span in which the job was sent."""
    async with serving(make_settings(tracing_endpoint=collector.url)) as client:
        assert (await client.post("/v1/answer", json=question())).status_code == 200
    request, sending = sorted(collector.spans, key=lambda span: span.kind)
    (job,) = worker.jobs
    assert job.trace is not None
    assert job.trace.traceparent.startswith(f"00-{request.trace}-{sending.id}-")
    assert sending.parent == request.id
    assert sending.attributes["messaging.message.id"] == job.id


async def test_without_an_endpoint_a_job_carries_nothing(
    make_settings: MakeSettings, worker: StandInWorker
) -> None:
    """Also where the caller is in a trace."""
    async with serving(make_settings()) as client:
        headers = {"traceparent": f"00-{'a' * 32}-{'b' * 16}-01"}
        assert (await client.post("/v1/answer", json=question(), headers=headers)).status_code == 200
    assert worker.jobs[0].trace is None


@pytest.mark.parametrize(
    ("sent", "status", "failed"),
    [(question(token_budget=0), 422, False), (question(), 503, True)],
)
async def test_an_error_is_one_of_the_servers_own(
    make_settings: MakeSettings, collector: Collector, sent: dict[str, Any], status: int, failed: bool
) -> None:
    """What the caller got wrong fails no span; that nobody works here does."""
    async with serving(make_settings(tracing_endpoint=collector.url, worker_grace_s=0)) as client:
        assert (await client.post("/v1/answer", json=sent)).status_code == status
    (request,) = collector.spans
    assert (request.kind, request.name, request.failed) == (SERVER, "POST /v1/answer", failed)
    assert request.attributes["http.response.status_code"] == status
    assert request.attributes.get("error.type") == (str(status) if failed else None)


async def test_what_asks_for_nothing_is_not_traced(make_settings: MakeSettings, collector: Collector) -> None:
    """Probes and scrapes make no spans; a path that is no route is not told either."""
    async with serving(make_settings(tracing_endpoint=collector.url)) as client:
        for path in ("/livez", "/readyz", "/healthz", "/metrics", "/v1/what-color-is-it"):
            await client.get(path)
    assert [span.name for span in collector.spans] == ["GET"]
    assert b"what-color" not in collector.bodies


async def test_a_collector_that_is_away_holds_up_nothing(
    make_settings: MakeSettings, worker: StandInWorker, nowhere: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers come, and the front end ends."""
    monkeypatch.setattr(tracing, "FLUSH_S", 0.1)
    async with serving(make_settings(tracing_endpoint=nowhere.replace("redis", "http"))) as client:
        assert (await client.post("/v1/answer", json=question())).status_code == 200


def test_without_the_extra_an_endpoint_is_refused(
    make_settings: MakeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the start, by the name of what is missing; without an endpoint nothing is."""

    def missing(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(contract, "distribution", missing)
    assert make_settings().tracing_endpoint is None
    with pytest.raises(ValidationError, match="extra `tracing`"):
        make_settings(tracing_endpoint="http://collector:4318")


def test_nothing_is_imported_while_traces_are_off() -> None:
    """Neither our own module nor exporter and spans of the SDK, whose metrics redis-py loads by itself."""
    script = "import sys, service.app; service.app.create_app(); print(*sys.modules)"
    environment = {"PRISM_MEDIA_URL": "memory://"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    ours = ("service.tracing", "opentelemetry.sdk.trace", "opentelemetry.exporter")
    assert not [name for name in done.stdout.split() if name.startswith(ours)]
