"""Media as a worker reads them, from a directory and from a store behind HTTP."""

from __future__ import annotations

import hashlib
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING

import pytest

from tests.worker.conftest import Worker, stored, video
from worker.contract import JobState, MediaRef, media_path
from worker.errors import MediaNotFoundError, StoreAwayError
from worker.store import MediaStore

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from redis import Redis

    from tests.worker.conftest import MakeJob

BUCKET = "s3://media"


@contextmanager
def bucket(monkeypatch: pytest.MonkeyPatch, status: int, body: bytes = b"") -> Iterator[list[str]]:
    """A server that answers as S3 does: the paths that it is asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
            self.send_header("ETag", '"x"')
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Not into the tests' output."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        for name, value in {
            "AWS_ENDPOINT": f"http://127.0.0.1:{server.server_address[1]}",
            "AWS_ALLOW_HTTP": "true",
            "AWS_REGION": "nowhere",
            "AWS_ACCESS_KEY_ID": "nobody",
            "AWS_SECRET_ACCESS_KEY": "nothing",
        }.items():
            monkeypatch.setenv(name, value)
        try:
            yield asked
        finally:
            server.shutdown()
            thread.join()


def ref_of(data: bytes) -> MediaRef:
    media_id = hashlib.sha256(data).hexdigest()
    return MediaRef(id=media_id, media_type="image/png", modality="image", size_bytes=len(data))


def test_media_are_read_whole_or_as_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Also of more bytes than come in one piece; a directory's file is not copied."""
    data = bytes(range(256)) * 2**16
    ref = ref_of(data)
    (tmp_path / "a b").mkdir()
    url = (tmp_path / "a b").as_uri()
    stored(url, data)
    local = MediaStore(url)
    with local.file(ref) as path:
        assert path == tmp_path / "a b" / media_path(ref.id)
        assert local.read(ref) == path.read_bytes() == data
    with bucket(monkeypatch, 200, data) as asked:
        distant = MediaStore(BUCKET)
        with distant.file(ref) as path:
            assert distant.read(ref) == path.read_bytes() == data
        assert not path.exists()
    assert asked == [f"/media/{media_path(ref.id)}"] * 2


@pytest.mark.parametrize(("status", "error"), [(403, StoreAwayError), (404, MediaNotFoundError)])
def test_a_store_that_refuses_is_not_one_without_the_media(
    monkeypatch: pytest.MonkeyPatch, status: int, error: type[Exception]
) -> None:
    with bucket(monkeypatch, status):
        store = MediaStore(BUCKET)
        with pytest.raises(error):
            store.read(ref_of(b""))
        with pytest.raises(error), store.file(ref_of(b"")):
            pytest.fail("there is no file")


def test_a_file_that_is_gone_is_told_of_before_it_is_opened(tmp_path: Path) -> None:
    with pytest.raises(MediaNotFoundError), MediaStore(tmp_path.as_uri()).file(ref_of(b"")):
        pytest.fail("there is no file")


def test_a_store_that_refuses_fails_the_job_for_now(
    monkeypatch: pytest.MonkeyPatch, make_job: MakeJob, worker: Worker, caplog: pytest.LogCaptureFixture
) -> None:
    """503, as the caller may try again; the log says what the operator is to look at."""
    job = make_job(media=(ref_of(b"nobody's"),))
    with bucket(monkeypatch, 403):
        monkeypatch.setattr(worker.runner, "_store", MediaStore(BUCKET))
        worker.run(job)
    assert worker.state(job) is JobState.FAILED
    assert (worker.problem(job).slug, worker.problem(job).status) == ("media-store-away", 503)
    assert "PermissionDeniedError" in caplog.text


class SlowStore(MediaStore):
    """Gives videos once it is let; which it was asked for."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.asked: list[str] = []
        self.first, self.let = threading.Event(), threading.Event()

    @contextmanager
    def file(self, ref: MediaRef) -> Iterator[Path]:
        self.asked.append(ref.id)
        self.first.set()
        assert self.let.wait(60)
        with super().file(ref) as path:
            yield path


def test_few_videos_are_decoded_at_once(
    monkeypatch: pytest.MonkeyPatch, make_job: MakeJob, redis: Redis, media_url: str
) -> None:
    """Pictures go past them; a video whose job ended while it waited for its turn is never decoded."""
    monkeypatch.setattr("worker.tasks.VIDEOS_AT_ONCE", 1)
    clips = [video(media_url, frames) for frames in (1, 2, 3)]
    jobs = [make_job(media=(clip,)) for clip in clips]
    jobs[1] = jobs[1].model_copy(update={"deadline_at": time.time() + 0.5})
    worker, store = Worker(redis, media_url), SlowStore(media_url)
    monkeypatch.setattr(worker.runner, "_store", store)
    with worker.engine:
        delivery = worker.deliver(jobs[0])
        assert store.first.wait(60)
        worker.run(jobs[1])
        worker.run(still := make_job())
        assert worker.state(jobs[0]) is JobState.RUNNING
        store.let.set()
        delivery.join()
        worker.run(jobs[2])
    states = [worker.state(job) for job in (*jobs, still)]
    assert states == [JobState.SUCCEEDED, JobState.EXPIRED, JobState.SUCCEEDED, JobState.SUCCEEDED]
    assert store.asked == [clips[0].id, clips[2].id]
