"""SIGTERM while callers wait: each is told what it can do next, and none is cut off."""

from __future__ import annotations

import http.client
import json
import threading
import time
from typing import TYPE_CHECKING

import pytest

from tests.service.conftest import StandInWorker, question
from tests.service.test_wire import connected, running, said
from worker.contract import JobState, job_key

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    import uvicorn
    from redis import Redis

    from tests.service.conftest import MakeSettings

ASKED = question(question="for ever")
CHAT = {
    "model": "prism-demo",
    "messages": [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "for ever"},
                {"type": "image_url", "image_url": {"url": ASKED["image"]}},
            ],
        }
    ],
}


def asking(
    port: int, path: str, body: Mapping[str, object] | None, headers: dict[str, str] | None = None
) -> http.client.HTTPConnection:
    """A connection that the request was sent on."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    sent = {"Content-Type": "application/json", **(headers or {})}
    connection.request(
        "GET" if body is None else "POST", path, None if body is None else json.dumps(body), sent
    )
    return connection


def until(condition: Callable[[], bool]) -> None:
    """Waits for `condition()`; a hang becomes a failure."""
    due = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < due
        time.sleep(0.005)


def until_asked(worker: StandInWorker, count: int = 1) -> None:
    """Waits until the worker has as many jobs."""
    until(lambda: len(worker.jobs) >= count)


def stop(running_server: uvicorn.Server) -> None:
    """As the handler of SIGTERM does."""
    running_server.should_exit = True


@pytest.fixture(autouse=True)
def _nothing_fails(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """No test leaves an error or a traceback in the log."""
    yield
    records = caplog.get_records("call")
    assert not [each.getMessage() for each in records if each.levelname == "ERROR" or each.exc_info]


@pytest.mark.parametrize("headers", [{}, {"Idempotency-Key": "k"}])
@pytest.mark.parametrize("grace_s", [1, 2])
def test_who_waits_for_an_answer_is_told_where_it_will_be(
    make_settings: MakeSettings,
    worker: StandInWorker,
    redis: Redis,
    headers: dict[str, str],
    grace_s: int,
) -> None:
    """202 with `Location`, as when its own time is over: the job goes on."""
    with running(make_settings, grace_s=grace_s) as (front_end, port):
        connection = asking(port, "/v1/answer", ASKED, headers)
        until_asked(worker)
        stop(front_end)
        response = connection.getresponse()
        told = json.loads(response.read())
        assert (response.status, told["state"]) == (202, "running")
        assert response.getheader("location") == f"/v1/jobs/{worker.jobs[0].id}"
        assert response.getheader("retry-after")
        assert response.getheader("x-request-id")
        connection.close()
    assert redis.hget(job_key(worker.jobs[0].id), "state") == JobState.RUNNING


@pytest.mark.parametrize(
    ("headers", "state"), [({}, JobState.CANCELED), ({"Idempotency-Key": "k"}, JobState.RUNNING)]
)
def test_a_chat_is_told_to_ask_again(
    make_settings: MakeSettings,
    worker: StandInWorker,
    redis: Redis,
    headers: dict[str, str],
    state: JobState,
) -> None:
    """503 in OpenAI's words; the job goes on only for a key, by which its caller can find it again."""
    with running(make_settings, grace_s=2) as (front_end, port):
        connection = asking(port, "/v1/chat/completions", CHAT, headers)
        until_asked(worker)
        stop(front_end)
        response = connection.getresponse()
        error = json.loads(response.read())["error"]
        assert (response.status, error["code"]) == (503, "server-stopping")
        assert response.getheader("retry-after")
        assert response.getheader("x-request-id")
        connection.close()
    assert redis.hget(job_key(worker.jobs[0].id), "state") == state


def test_streams_end_and_go_on_elsewhere(
    make_settings: MakeSettings,
    worker: StandInWorker,
    redis: Redis,
) -> None:
    """A whole reply without an end of the job, which goes on; the next front end tells the rest."""
    with running(make_settings, grace_s=2) as (front_end, port):
        asker = asking(port, "/v1/answer", {**ASKED, "stream": True}).getresponse()
        until_asked(worker)
        job = worker.jobs[0].id
        reader = asking(port, f"/v1/jobs/{job}/events", None).getresponse()
        stop(front_end)
        for response in (asker, reader):
            told = response.read().decode()  # raises IncompleteRead where it is cut off
            assert "event: queued" in told
            assert not [end for end in ("completed", "failed", "canceled", "expired") if end in told]
    assert redis.hget(job_key(job), "state") == JobState.RUNNING
    last = [line.removeprefix("id: ") for line in told.splitlines() if line.startswith("id: ")][-1]
    worker.release.set()
    with running(make_settings) as (_, port):
        rest = asking(port, f"/v1/jobs/{job}/events", None, {"Last-Event-ID": last}).getresponse()
        told = rest.read().decode()
    assert "event: completed" in told
    assert "event: queued" not in told


def test_a_chats_stream_ends_with_the_error(make_settings: MakeSettings, worker: StandInWorker) -> None:
    """Half an answer must not look like a whole one."""
    with running(make_settings, grace_s=2) as (front_end, port):
        response = asking(port, "/v1/chat/completions", {**CHAT, "stream": True}).getresponse()
        until_asked(worker)
        stop(front_end)
        *_, error, done = response.read().decode().strip().split("\n\n")
        assert json.loads(error.removeprefix("data: "))["error"]["code"] == "server-stopping"
        assert done == "data: [DONE]"


def test_an_answer_within_the_grace_is_still_waited_for(
    make_settings: MakeSettings, worker: StandInWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who waits is told nothing before the last second."""
    told = threading.Event()
    monkeypatch.setattr("service.jobs.Jobs.stop_waiting", lambda _self: told.set())
    with running(make_settings, grace_s=30) as (front_end, port):
        connection = asking(port, "/v1/answer", ASKED)
        until_asked(worker)
        stop(front_end)
        time.sleep(0.3)
        worker.release.set()
        response = connection.getresponse()
        assert (response.status, json.loads(response.read())["answer"]) == (200, "red")
        connection.close()
    assert not told.is_set()


def until_connected(front_end: uvicorn.Server, count: int) -> None:
    """Waits until the server has as many connections."""
    until(lambda: len(front_end.server_state.connections) == count)


def until_stopping(front_end: uvicorn.Server) -> None:
    """Waits until its shutdown has begun, which is when answers say that connections close."""
    until(lambda: (b"connection", b"close") in front_end.server_state.default_headers)


@pytest.mark.parametrize("used", [False, True])
def test_a_request_that_comes_as_the_server_stops_is_answered(
    make_settings: MakeSettings, used: bool
) -> None:
    """Also over a connection that had none, or none since the last; the answer says that it closes."""
    with running(make_settings) as (front_end, port):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.connect()
        if used:
            connection.request("GET", "/livez")
            response = connection.getresponse()
            assert response.read()
            assert not response.will_close
        until_connected(front_end, 1)
        stop(front_end)
        until_stopping(front_end)
        connection.request("GET", "/livez")
        response = connection.getresponse()
        assert (response.status, response.will_close) == (200, True)
        connection.close()


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/v1/answer", "application/json"),
        ("/v1/answer", "multipart/form-data; boundary=x"),
        ("/v1/media", "image/png"),
        ("/v1/chat/completions", "application/json"),
    ],
)
def test_a_body_that_does_not_come_in_time_is_told_why(
    make_settings: MakeSettings,
    worker: StandInWorker,
    caplog: pytest.LogCaptureFixture,
    path: str,
    kind: str,
) -> None:
    """Its caller gets an answer to act on; the log says that it was cut off, without a traceback."""
    with running(make_settings, grace_s=1) as (front_end, port):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.putrequest("POST", path)
        connection.putheader("Content-Type", kind)
        connection.putheader("Content-Length", "1000")
        connection.endheaders(b'--x\r\nContent-Disposition: form-data; name="question"\r\n\r\n')
        until(lambda: bool(front_end.server_state.tasks))
        stop(front_end)
        response = connection.getresponse()
        told = json.loads(response.read())
        assert response.status == 503
        assert "server-stopping" in (
            told.get("type", "").rpartition("/")[2],
            told.get("error", {}).get("code"),
        )
        assert response.getheader("retry-after")
        assert response.getheader("x-request-id")
        connection.close()
    assert not worker.jobs
    (logged,) = [each for each in caplog.records if each.levelname == "ERROR" or each.exc_info]
    assert logged.getMessage().startswith("Cancel 1 running task")
    caplog.clear()


def test_a_head_that_has_begun_may_be_finished(make_settings: MakeSettings) -> None:
    """It has its time like any other; a connection over which nothing came is closed before."""
    with running(make_settings) as (front_end, port):
        begun, silent = connected(port), connected(port)
        begun.sendall(b"GET /livez HTTP/1.1\r\n")
        until_connected(front_end, 2)
        stop(front_end)
        assert said(silent) == b""
        begun.sendall(b"Host: x\r\n\r\n")
        answered = said(begun)
        assert answered.startswith(b"HTTP/1.1 200")
        assert b"connection: close" in answered
        begun.close()


def test_no_caller_of_a_server_that_stops_is_cut_off(make_settings: MakeSettings) -> None:
    """Each has a whole answer or no connection, whenever it asks for one: it knows where it stands."""
    over, cut, answered = threading.Event(), [], []

    def call(port: int) -> None:
        while not over.is_set():
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            try:
                connection.connect()
            except ConnectionRefusedError:
                time.sleep(0.01)
                continue
            try:
                connection.request("GET", "/livez")
                answered.append(connection.getresponse().read())
            except (OSError, http.client.HTTPException) as error:
                cut.append(error)
            finally:
                connection.close()

    with running(make_settings) as (_, port):
        callers = [threading.Thread(target=call, args=(port,)) for _ in range(6)]
        for caller in callers:
            caller.start()
        until(lambda: len(answered) >= 100)
    over.set()
    for caller in callers:
        caller.join()
    assert cut == []
