"""Probes, metrics, the build and the documentation."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from typing import TYPE_CHECKING

import pytest
from prometheus_client.parser import text_string_to_metric_families
from redis.asyncio import Redis as AsyncRedis

from service.broker import Durability
from service.errors import BrokerNotDurableError
from service.settings import ServiceSettings
from tests.service.conftest import StandInWorker, data_uri, png, question, serving, until

if TYPE_CHECKING:
    from collections.abc import Iterator

    import httpx
    from redis import Redis

    from tests.service.conftest import MakeSettings


async def test_probes_need_neither_broker_nor_worker(make_settings: MakeSettings, nowhere: str) -> None:
    """A front end is alive and accepts while the rest is away; `/healthz` names what is missing."""
    async with serving(make_settings(broker_url=nowhere)) as client:
        assert (await client.get("/livez")).status_code == 200
        assert (await client.get("/readyz")).status_code == 200
        health = await client.get("/healthz")
    assert health.status_code == 503
    assert health.json() == {
        "status": "unavailable",
        "broker": {"state": "away"},
        "worker": {"state": "unknown", "model": "prism-demo"},
    }


async def test_healthy_means_a_warm_worker_of_the_default_model(
    client: httpx.AsyncClient, worker: StandInWorker, redis: Redis
) -> None:
    """Absent, warming, warm, lost: only warm is 200; another model's worker does not count."""
    states = []
    redis.flushall()
    worker.beat(model="another")
    for beat in (None, {"warm": False}, {"warm": True}, {"age_s": 16}):
        if beat is not None:
            worker.beat(**beat)
        response = await client.get("/healthz")
        states.append((response.status_code, response.json()["worker"]["state"]))
    assert states == [(503, "absent"), (503, "warming"), (200, "warm"), (503, "absent")]


async def test_a_heartbeat_of_another_version_is_left_out(
    client: httpx.AsyncClient, worker: StandInWorker, redis: Redis
) -> None:
    """One worker that this version cannot read does not take the front end away."""
    redis.hset("prism:workers", "newer", '{"worker_id": "newer", "shape": "unknown"}')
    assert (await client.get("/healthz")).json()["worker"]["seen"] == 1


async def scrape(client: httpx.AsyncClient) -> dict[tuple[str, ...], float]:
    """Every sample of `/metrics` by its name and label values; the whole page must parse."""
    response = await client.get("/metrics")
    assert response.status_code == 200
    families = text_string_to_metric_families(response.text)
    return {
        (sample.name, *sample.labels.values()): sample.value for each in families for sample in each.samples
    }


async def test_requests_are_observed_by_route_method_and_status(client: httpx.AsyncClient) -> None:
    """Templates, not paths: an id makes no series of its own; strange methods and routes neither."""
    for path in ("/v1/jobs/job_1", "/v1/jobs/job_2", "/a", "/b"):
        await client.get(path)
    await client.request("BREW", "/livez")
    await client.post("/v1/answer", json=question())
    samples = await scrape(client)
    name = "prismprune_http_request_duration_seconds_count"
    counted = {frozenset(labels): value for (family, *labels), value in samples.items() if family == name}
    assert counted == {
        frozenset(("/v1/jobs/{job_id}", "GET", "404")): 2,
        frozenset(("unmatched", "GET", "404")): 2,
        frozenset(("/livez", "other", "405")): 1,
        frozenset(("/v1/answer", "POST", "200")): 1,
    }


async def test_refusals_are_counted_by_reason(client: httpx.AsyncClient) -> None:
    """Once each; a job that fails later was not refused."""
    await client.post("/v1/answer", json=question(token_budget=0))
    await client.post("/v1/answer", json=question(image=data_uri(b"text")))
    await client.post("/v1/answer", json=question(question="expire"))
    samples = await scrape(client)
    name = "prismprune_admission_rejections_total"
    refused = {key[1]: value for key, value in samples.items() if key[0] == name}
    assert refused == {"invalid-budget": 1, "unsupported-media-type": 1}


async def test_queue_and_workers_are_counted_at_the_scrape(
    client: httpx.AsyncClient, worker: StandInWorker
) -> None:
    """Jobs that wait, by model, and workers that were seen lately."""
    worker.beat(model="other")
    await client.post("/v1/answer", json=question(model="other"), headers={"Prefer": "respond-async"})
    samples = await scrape(client)
    assert samples["prismprune_queue_depth", "other"] == 1
    assert samples["prismprune_queue_depth", "prism-demo"] == 0
    assert samples["prismprune_workers", "prism-demo"] == 1
    worker.beat(model="other", age_s=60)
    assert (await scrape(client))["prismprune_workers", "other"] == 0


async def test_how_full_the_broker_is_stands_on_the_page(client: httpx.AsyncClient, redis: Redis) -> None:
    """What it uses, and its maxmemory: 0 where it has none."""
    samples = await scrape(client)
    assert samples["prismprune_broker_memory_used_bytes",] > 2**19
    assert samples["prismprune_broker_memory_limit_bytes",] == 0
    redis.config_set("maxmemory", 2**30)
    try:
        assert (await scrape(client))["prismprune_broker_memory_limit_bytes",] == 2**30
    finally:
        redis.config_set("maxmemory", 0)


async def test_how_full_a_broker_is_that_is_away_is_not_known(
    make_settings: MakeSettings, worker: StandInWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NaN, not what it was before: no rule takes an old number for a new one."""
    async with serving(make_settings(broker_timeout_s=0.1)) as client:
        assert (await scrape(client))["prismprune_broker_memory_used_bytes",] > 0

        async def silent(*_: object) -> None:
            await asyncio.sleep(60)

        monkeypatch.setattr(AsyncRedis, "info", silent)
        samples = await scrape(client)
    for name in ("used", "limit"):
        assert math.isnan(samples[f"prismprune_broker_memory_{name}_bytes",])
    assert samples["prismprune_workers", "prism-demo"] == 1


async def test_a_failover_to_a_broker_that_may_lose_jobs_is_noticed(
    make_settings: MakeSettings,
    broker_url: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """One that was fit at the start is looked at again, told of once, and given no jobs if it must be fit."""
    monkeypatch.setattr("service.broker.KNOWN_FOR_S", 0.01)
    fit = {"maxmemory_policy": "noeviction", "aof_enabled": 1}
    said, asked = dict(fit), list[int]()

    async def info(*_: object) -> dict[str, object]:
        asked.append(1)
        return said

    monkeypatch.setattr(AsyncRedis, "info", info)
    async with AsyncRedis.from_url(broker_url) as redis:
        durability = Durability(redis, make_settings(require_durable_broker=True))
        async with durability.watching():
            await until(lambda: len(asked) > 3)
            durability.require()
            assert "NOT DURABLE" not in caplog.text
            monkeypatch.setattr("service.broker.LOOK_AGAIN_S", 0.01)
            said["aof_enabled"] = 0
            count = len(asked)
            await until(lambda: len(asked) > count + 3)
            with pytest.raises(BrokerNotDurableError):
                durability.require()
            caplog.set_level(logging.INFO, "service.broker")
            said.update(fit)
            await until(lambda: "is durable now" in caplog.text)
            durability.require()
    assert caplog.text.count("NOT DURABLE") == 1


class _WorkerMetrics(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/metrics" else 500)
        self.end_headers()
        self.wfile.write(b"# TYPE prismprune_jobs_running gauge\nprismprune_jobs_running 3.0")

    def log_message(self, *_: object) -> None:
        """Says nothing."""


@pytest.fixture
def upstream() -> Iterator[str]:
    """URL of a worker's metrics."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _WorkerMetrics) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


async def test_one_scrape_shows_the_workers_metrics_too(
    make_settings: MakeSettings, upstream: str, nowhere: str
) -> None:
    """Upstreams that answer are appended, the others left out and named; so is a broker that is away."""
    up, broken, away = f"{upstream}/metrics", f"{upstream}/other", nowhere.replace("redis", "http")
    settings = make_settings(broker_url=nowhere, metrics_upstreams=f"{up}, {broken},{away}")
    async with serving(settings) as client:
        samples = await scrape(client)
    assert samples["prismprune_jobs_running",] == 3
    name = "prismprune_metrics_upstream_up"
    assert [samples[name, url] for url in (up, broken, away)] == [1, 0, 0]
    assert not any(key[0] == "prismprune_queue_depth" for key in samples)


async def test_concurrent_scrapes_are_each_whole(client: httpx.AsyncClient) -> None:
    """No scrape sees the gauges while another one fills them."""
    for samples in await asyncio.gather(*(scrape(client) for _ in range(20))):
        assert samples["prismprune_workers", "prism-demo"] == 1


async def test_the_build_is_named(make_settings: MakeSettings) -> None:
    """`/version` has the package's version and the commit that the operator set."""
    async with serving(make_settings(build_revision="abc")) as client:
        body = (await client.get("/version")).json()
    assert (body["version"], body["revision"]) == (version("prismprune"), "abc")


async def test_the_documented_examples_work(client: httpx.AsyncClient) -> None:
    """Each example of `/docs` is answered as it stands."""
    document = (await client.get("/openapi.json")).json()
    for path, count in (("/v1/answer", 3), ("/v1/chat/completions", 2)):
        content = document["paths"][path]["post"]["requestBody"]["content"]
        examples = content["application/json"]["examples"].values()
        assert len(examples) >= count
        for example in examples:
            response = await client.post(path, json=example["value"])
            assert response.status_code == 200, response.text


async def test_every_reference_of_the_document_resolves(client: httpx.AsyncClient) -> None:
    """The document is whole, also for the body that the route reads itself."""
    document = (await client.get("/openapi.json")).json()

    def references(node: object) -> Iterator[str]:
        if isinstance(node, dict):
            yield from ([node["$ref"]] if isinstance(node.get("$ref"), str) else [])
            for each in node.values():
                yield from references(each)
        elif isinstance(node, list):
            for each in node:
                yield from references(each)

    schemas = document["components"]["schemas"]
    named = {each.rpartition("/")[2] for each in references(document)}
    assert "AnswerRequest" in named
    assert named <= set(schemas)
    assert schemas["AnswerRequest"]["properties"]["token_budget"]


def test_settings_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """`PRISM_` and the field's name; lists are separated by commas; empty means the default."""
    monkeypatch.setenv("PRISM_MEDIA_URL", "memory:///")
    monkeypatch.setenv("PRISM_METRICS_UPSTREAMS", "http://a/metrics, http://b/metrics")
    monkeypatch.setenv("PRISM_MODEL", "")
    settings = ServiceSettings()
    assert settings.metrics_upstreams == ("http://a/metrics", "http://b/metrics")
    assert (settings.model, settings.max_image_pixels) == ("prism-demo", 25_000_000)


async def test_a_store_in_memory_serves_too(make_settings: MakeSettings, worker: StandInWorker) -> None:
    """The store is whatever the URL says; here the image is put into memory and found by its id."""
    async with serving(make_settings(media_url="memory:///")) as client:
        headers = {"Prefer": "respond-async"}
        assert (await client.post("/v1/answer", json=question(), headers=headers)).status_code == 202
        by_id = question(image={"id": hashlib.sha256(png()).hexdigest()})
        assert (await client.post("/v1/answer", json=by_id, headers=headers)).status_code == 202
