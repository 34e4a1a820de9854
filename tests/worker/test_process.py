"""A real worker: `python -m worker`, supervisor and all, on a real broker, with a tiny random LLaVA."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from urllib.request import urlopen

import pytest
from celery import Celery
from prometheus_client.parser import text_string_to_metric_families
from transformers.models.llama.modeling_llama import LlamaModel

from prismprune import cpu_products
from prismprune.cpu_products import available
from tests.prismprune.tiny import PATCHES, picture, save_tiny_llava
from tests.replies import entries, field, state
from worker import process
from worker.contract import (
    TASK_ANSWER,
    WORKERS_KEY,
    AnswerResult,
    Generation,
    JobEvent,
    JobState,
    WorkerStatus,
    events_channel,
    events_key,
    job_key,
    queue_name,
)
from worker.settings import WorkerSettings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from redis import Redis

    from tests.worker.conftest import MakeJob
    from worker.contract import AnswerJob


@contextmanager
def worker_process(**settings: object) -> Iterator[subprocess.Popen[str]]:
    """`python -m worker` with these settings; ended with the block, one way or the other."""
    environment = os.environ | {f"PRISM_{name.upper()}": str(value) for name, value in settings.items()}
    environment |= {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "worker"]
    running = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        yield running
    finally:
        running.kill()
        running.communicate()


def until(look: Callable[[], Any], running: subprocess.Popen[str]) -> Any:
    """What `look` finds at last; fails when the process ends."""
    while (found := look()) is None:
        assert running.poll() is None, running.stderr.read() if running.stderr else ""
        time.sleep(0.02)
    return found


def warm_status(redis: Redis) -> WorkerStatus | None:
    """The one worker's status, once it is warm."""
    statuses = [WorkerStatus.model_validate_json(text) for text in redis.hvals(WORKERS_KEY)]
    return next((status for status in statuses if status.warm), None)


def enqueue(broker_url: str, job: AnswerJob) -> None:
    """Sends the job as the front end does, which knows the contract and no more."""
    with Celery(broker=broker_url, set_as_current=False) as front_end:
        front_end.send_task(
            TASK_ANSWER,
            args=(job.model_dump(mode="json"),),
            task_id=job.id,
            queue=queue_name(job.model),
            argsrepr="()",
            ignore_result=True,
        )


def scrape(port: int) -> dict[str, float]:
    """Sums and counts by name, over all labels."""
    with urlopen(f"http://127.0.0.1:{port}/metrics") as response:
        families = list(text_string_to_metric_families(response.read().decode()))
    values: dict[str, float] = {}
    for sample in (sample for family in families for sample in family.samples):
        values[sample.name] = values.get(sample.name, 0) + sample.value
    return values


def test_a_worker_answers_measures_and_finishes_before_it_leaves(
    broker_url: str, redis: Redis, media_url: str, make_job: MakeJob, tmp_path: Path, *, port: int
) -> None:
    """Queued, running, succeeded; seen in the metrics; a job that runs at SIGTERM still gets its answer."""
    model = str(save_tiny_llava(tmp_path / "tiny"))
    told = {"broker_url": broker_url, "media_url": media_url, "model": model, "worker_metrics_port": port}
    with worker_process(**told) as running, redis.pubsub(ignore_subscribe_messages=True) as listener:
        status = until(lambda: warm_status(redis), running)
        assert (status.family, status.device, status.default_token_budget) == ("llava", "cpu", 64)

        job = make_job(model=model, token_budget=8, generation=Generation(max_new_tokens=4), stream=True)
        listener.subscribe(events_channel(job.id))
        enqueue(broker_url, job)
        events: list[JobState] = []
        while JobState.SUCCEEDED not in events:
            message = until(lambda: listener.get_message(timeout=1), running)
            events.append(JobEvent.model_validate_json(message["data"]).state)
        assert set(events[:-1]) == {JobState.RUNNING}
        result = AnswerResult.model_validate_json(field(redis, job_key(job.id), "result"))
        assert (result.visual_tokens.original, result.visual_tokens.kept) == (PATCHES, 8)
        assert result.usage is not None
        assert result.usage.completion_tokens <= 4
        stream = entries(redis, events_key(job.id))
        texts = [json.loads(entry["data"]).get("text", "") for entry in stream]
        assert (stream[0]["event"], stream[-1]["event"]) == ("started", "completed")
        assert "".join(texts) == result.answer

        seen = scrape(port)
        assert seen["prismprune_request_latency_seconds_count"] == 1
        assert seen["prismprune_visual_tokens_kept_sum"] == 8
        assert seen["prismprune_device_memory_peak_bytes_sum"] == result.memory.peak_bytes
        assert seen["prismprune_device_memory_allocated_bytes"] > 0

        last = make_job(model=model, generation=Generation(max_new_tokens=200))
        enqueue(broker_url, last)
        until(lambda: state(redis, last.id) is not JobState.QUEUED or None, running)
        running.send_signal(signal.SIGTERM)
        assert running.wait(30) == 0
        assert state(redis, last.id) is JobState.SUCCEEDED
        assert redis.zcard("unacked_index") == redis.llen(queue_name(model)) == 0
        assert not redis.exists(WORKERS_KEY)


def test_a_worker_without_its_model_says_so_and_leaves(
    broker_url: str, redis: Redis, media_url: str, tmp_path: Path
) -> None:
    """One line, exit code 1, and no worker in the list."""
    told = {"broker_url": broker_url, "media_url": media_url, "model": tmp_path, "worker_metrics_port": 0}
    with worker_process(**told) as running:
        _, log = running.communicate(timeout=60)
    assert running.returncode == 1
    assert f"{tmp_path} cannot be served: " in log
    assert "(ValueError: " in log  # why, and not only that it was not found
    assert "Traceback" not in log
    assert not redis.exists(WORKERS_KEY)


def test_a_worker_serves_the_revision_that_it_is_told(
    monkeypatch: pytest.MonkeyPatch, broker_url: str, redis: Redis, media_url: str, tmp_path: Path
) -> None:
    """From the hub's cache, whose `main` is another commit; weights, processor and all, and it says so."""
    pinned, repository = "1" * 40, tmp_path / "hub" / "models--us--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("2" * 40)
    save_tiny_llava(repository / "snapshots" / pinned)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    told = {"broker_url": broker_url, "media_url": media_url, "model": "us/tiny", "worker_metrics_port": 0}
    with worker_process(**told, revision=pinned) as running:
        status = until(lambda: warm_status(redis), running)
    assert (status.model, status.family, status.revision) == ("us/tiny", "llava", pinned)


def test_a_dead_part_ends_the_process(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """At once and with a code of its own; the log has the kind of error and not what it quotes."""
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    process._die("engine", SystemExit("secret"))
    assert codes == [process.EX_ENGINE_DIED]
    assert "the engine died: SystemExit" in caplog.text
    assert "secret" not in caplog.text


@pytest.mark.skipif(not available(), reason="these steps are taken on x86 CPUs alone")
def test_a_loaded_model_is_watched_and_none_the_slower(
    monkeypatch: pytest.MonkeyPatch, broker_url: str, media_url: str, tmp_path: Path
) -> None:
    """A step goes past transformers' modules, and each layer of it is a sign of progress all the same."""
    monkeypatch.setattr(cpu_products, "mkl_is_fast", lambda: False)
    path = str(save_tiny_llava(tmp_path / "tiny"))
    worker = process.WorkerProcess(
        WorkerSettings(model=path, device="cpu", broker_url=broker_url, media_url=media_url), "name", -1
    )
    heard, fed = list[str](), list[int]()
    monkeypatch.setattr(worker._engine, "progress", lambda: heard.append("layer"))
    model, forward = worker._load(), LlamaModel.forward

    def noted(self: Any, *args: Any, **given: Any) -> Any:
        fed.append(given["inputs_embeds"].shape[1])
        return forward(self, *args, **given)

    monkeypatch.setattr(LlamaModel, "forward", noted)
    heard.clear()
    answer = model.answer(picture(), "What is it?", token_budget=8, max_new_tokens=4)
    assert fed == [answer.prompt_tokens]
    text, vision = model.model.config.text_config, model.model.config.vision_config
    assert len(answer.token_ids) == 4
    assert len(heard) >= 4 * text.num_hidden_layers + vision.num_hidden_layers - 1
