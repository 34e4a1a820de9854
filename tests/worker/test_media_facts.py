"""What only decoding tells of a video is noted beside it, for the front end to tell its owner."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.worker.conftest import video
from worker.contract import JobState, MediaRef, media_key
from worker.jobs import Jobs, connect

if TYPE_CHECKING:
    from tests.worker.conftest import MakeJob, Worker

FRAMES = 9


@pytest.fixture
def clip(media_url: str) -> MediaRef:
    """Nine frames of 64 x 48 in the store."""
    return video(media_url, FRAMES)


def test_a_decoded_video_has_its_size_and_every_frame_noted(
    worker: Worker, make_job: MakeJob, clip: MediaRef
) -> None:
    """Those of the file, not of the four frames that were looked at."""
    worker.redis.hset(media_key(clip.id), mapping={"owner:": 1, "bytes": clip.size_bytes})
    job = make_job(media=(clip,), sampling={"num_frames": 4})
    worker.run(job)
    assert worker.state(job) is JobState.SUCCEEDED
    noted = worker.redis.hgetall(media_key(clip.id))
    assert {name: noted.get(name) for name in ("width", "height", "frames", "owner:")} == {
        "width": "64",
        "height": "48",
        "frames": str(FRAMES),
        "owner:": "1",
    }


def test_media_that_expired_meanwhile_stay_forgotten(
    worker: Worker, make_job: MakeJob, clip: MediaRef
) -> None:
    """A hash written now would belong to nobody and never expire."""
    worker.run(make_job(media=(clip,)))
    assert not worker.redis.exists(media_key(clip.id))


def test_a_picture_needs_nothing_noted(worker: Worker, make_job: MakeJob, picture: MediaRef) -> None:
    """Its header told the front end everything."""
    worker.redis.hset(media_key(picture.id), "bytes", picture.size_bytes)
    worker.run(make_job())
    assert worker.redis.hkeys(media_key(picture.id)) == ["bytes"]


def test_a_broker_that_is_away_costs_no_job(caplog: pytest.LogCaptureFixture) -> None:
    """What could not be noted is logged; the next decoding tells it again."""
    with connect("redis://127.0.0.1:1/0", patient=False) as nobody:
        Jobs(nobody, nobody, "tiny", lease_s=60, max_attempts=3).describe("0" * 64, 64, 48, FRAMES)
    assert "was not noted" in caplog.text
