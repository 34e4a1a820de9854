"""`POST /v1/media`: taken in as it comes, kept under its hash for its owner, deleted in time."""

from __future__ import annotations

import asyncio
import hashlib
import io
import time
from pathlib import Path
from types import SimpleNamespace
from typing import IO, TYPE_CHECKING, Any

import pytest
from PIL import ExifTags, Image

from service.app import _redis
from service.errors import StoreAwayError, UnknownMediaError
from service.fetch import Fetcher
from service.keys import Caller
from service.media import Intake, MediaStore, open_store
from service.shelf import DELETING_KEY, EXPIRY_KEY, Shelf
from service.sweeper import SPARE_S, Sweeper
from tests.present import present
from tests.service.conftest import MP4, StandInWorker, encoded, png, problem, question, serving, stored, until
from worker.contract import MediaRef, media_key, media_path

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import httpx
    from redis import Redis

    from service.settings import ServiceSettings
    from tests.service.conftest import MakeSettings

ALICE = Caller("alice")


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("multipart", [False, True])
@pytest.mark.parametrize(
    ("data", "told"),
    [
        (png(32, 24), {"media_type": "image/png", "width": 32, "height": 24, "frames": 1}),
        (encoded("GIF", 32, 24), {"media_type": "image/gif", "width": 32, "height": 24, "frames": None}),
        (MP4, {"media_type": "video/mp4", "width": None, "height": None, "frames": None}),
    ],
)
async def test_an_upload_is_stored_under_its_hash(
    client: httpx.AsyncClient, media_directory: Path, *, data: bytes, told: dict[str, Any], multipart: bool
) -> None:
    """As the body itself, whatever its declared type, or as one part of a form."""
    sent: dict[str, Any] = {"files": {"file": ("a", data, "text/plain")}} if multipart else {"content": data}
    response = await client.post("/v1/media", **sent)
    assert response.status_code == 200, response.text
    body = response.json()
    assert abs(body.pop("expires_at") - time.time() - 24 * 3600) < 60
    assert body == {"id": sha256(data), "bytes": len(data), **told}
    assert (media_directory / media_path(sha256(data))).read_bytes() == data


async def test_the_same_file_again_is_the_same_media(client: httpx.AsyncClient, redis: Redis) -> None:
    """It is told what a worker has found out in between."""
    first = (await client.post("/v1/media", content=MP4)).json()
    redis.hset(media_key(first["id"]), mapping={"width": 640, "height": 480, "frames": 90})
    again = (await client.post("/v1/media", content=MP4)).json()
    assert again["id"] == first["id"]
    assert (again["width"], again["height"], again["frames"]) == (640, 480, 90)


@pytest.mark.parametrize(("orientation", "size"), [(1, (32, 24)), (6, (24, 32)), (99, (32, 24))])
async def test_sizes_are_those_of_the_upright_picture(
    client: httpx.AsyncClient, orientation: int, size: tuple[int, int]
) -> None:
    """As boxes in a token map are; an orientation that EXIF does not know changes nothing."""
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[ExifTags.Base.Orientation] = orientation
    Image.new("RGB", (32, 24)).save(buffer, "JPEG", exif=exif)
    body = (await client.post("/v1/media", content=buffer.getvalue())).json()
    assert (body["width"], body["height"]) == size


async def test_uploaded_media_are_asked_about_by_id(client: httpx.AsyncClient, worker: StandInWorker) -> None:
    """Sent once, asked about twice."""
    media = (await client.post("/v1/media", content=png())).json()
    for _ in range(2):
        response = await client.post("/v1/answer", json=question(image={"id": media["id"]}))
        assert response.status_code == 200, response.text
    assert {job.media[0].id for job in worker.jobs} == {media["id"]}


@pytest.mark.parametrize(
    ("data", "status", "slug"),
    [
        (b"", 415, "unsupported-media-type"),
        (b"#EXTM3U\nhttp://10.0.0.1/", 415, "unsupported-media-type"),
        (png()[:20], 422, "undecodable-media"),
        (encoded("BMP", 80, 80), 413, "media-too-large"),
        (png(300, 300), 413, "media-too-large"),
        (MP4 + bytes(9000), 413, "media-too-large"),
    ],
)
@pytest.mark.parametrize("multipart", [False, True])
async def test_what_is_refused_is_not_stored(
    make_settings: MakeSettings,
    media_directory: Path,
    *,
    data: bytes,
    status: int,
    slug: str,
    multipart: bool,
) -> None:
    """Formats, bytes and pixels have the limits that they have in a question."""
    settings = make_settings(max_image_bytes=9000, max_video_bytes=9000, max_image_pixels=10_000)
    sent: dict[str, Any] = {"files": {"file": data}} if multipart else {"content": data}
    async with serving(settings) as client:
        problem(await client.post("/v1/media", **sent), status, slug)
    assert stored(media_directory) == []


async def test_a_form_holds_one_file(client: httpx.AsyncClient) -> None:
    """Neither none, nor two, nor a text."""
    files = [("file", png()), ("file", png())]
    for sent in (
        {"files": files},
        {"data": {"file": "text"}, "files": {"other": png()}},
        {"files": [("a", (None, "text"))]},
    ):
        assert "exactly one" in problem(await client.post("/v1/media", **sent), 422, "invalid-request")


async def test_limits_are_counted_while_the_body_comes(make_settings: MakeSettings) -> None:
    """An endless upload ends at its limit, and one of a wrong format at its first bytes."""
    taken = 0

    async def endless(head: bytes) -> AsyncIterator[bytes]:
        nonlocal taken
        yield head
        for taken in range(10_000):  # noqa: B007 - it counts
            yield bytes(4096)

    settings = make_settings(max_image_bytes=100_000, max_multipart_bytes=1_000_000)
    async with serving(settings) as client:
        problem(await client.post("/v1/media", content=endless(png())), 413, "media-too-large")
        assert taken <= 26
        problem(await client.post("/v1/media", content=endless(b"text")), 415, "unsupported-media-type")
        assert taken <= 2
        problem(await client.post("/v1/media", content=endless(MP4)), 413, "body-too-large")
        assert taken <= 246


async def test_a_body_that_drips_is_ended(make_settings: MakeSettings) -> None:
    """Time is counted too, of whatever route."""

    async def drip() -> AsyncIterator[bytes]:
        while True:
            yield b"\x89"
            await asyncio.sleep(0.01)

    async with serving(make_settings(body_timeout_s=0.1)) as client:
        for route in ("/v1/media", "/v1/answer"):
            headers = {"Content-Type": "application/json"}
            problem(await client.post(route, content=drip(), headers=headers), 408, "request-timeout")


async def test_a_waiting_caller_is_not_mistaken_for_a_slow_body(
    make_settings: MakeSettings, worker: StandInWorker
) -> None:
    """Once the body is complete the connection may stay as long as the answer takes."""
    async with serving(make_settings(body_timeout_s=0.1)) as client:
        body = question(question="for ever", timeout_s=0.3)
        assert (await client.post("/v1/answer", json=body)).status_code == 202
    worker.release.set()


async def test_without_a_broker_an_upload_is_refused_before_it_is_read(
    make_settings: MakeSettings, nowhere: str
) -> None:
    """Whose it would be could not be remembered."""
    read = []

    async def body() -> AsyncIterator[bytes]:
        read.append(1)
        yield png()

    async with serving(make_settings(broker_url=nowhere)) as client:
        refused = await client.post("/v1/media", content=body())
    problem(refused, 503, "broker-away")
    assert refused.headers["retry-after"] == "2"
    assert read == []


class Parts:
    """A media store with all that belongs to it, on the test's broker."""

    def __init__(self, redis: Any, settings: ServiceSettings) -> None:
        store = open_store(settings.media_url)
        self.shelf = Shelf(redis, settings)
        self.media = MediaStore(store, self.shelf, Fetcher(settings), settings)
        self.sweeper = Sweeper(store, self.shelf, settings)

    async def upload(self, data: bytes) -> str:
        return (await self.media.upload(io.BytesIO(data), ALICE)).id


@pytest.fixture
async def parts(make_settings: MakeSettings) -> AsyncIterator[Parts]:
    settings = make_settings()
    async with _redis(settings) as redis:
        yield Parts(redis, settings)


def expire(redis: Redis, media_id: str) -> None:
    """Lets the media's time be over."""
    redis.zadd(EXPIRY_KEY, {media_id: time.time() - 1})


async def test_expired_media_are_deleted_and_others_are_not(
    parts: Parts, redis: Redis, media_directory: Path
) -> None:
    """Bytes and entries both go; a second sweep finds nothing."""
    old, new = await parts.upload(png(color="red")), await parts.upload(png(color="blue"))
    expire(redis, old)
    assert await parts.sweeper.sweep() == 1
    assert await parts.sweeper.sweep() == 0
    assert {path.name for path in (media_directory / "media").iterdir()} == {new}
    assert not redis.exists(media_key(old))
    assert await parts.shelf.facts(old, ALICE) is None
    assert await parts.shelf.facts(new, ALICE)


async def test_every_use_puts_the_end_off(
    client: httpx.AsyncClient, worker: StandInWorker, redis: Redis
) -> None:
    """Media outlive their last job: no deadline is as far away as they live after a question."""
    media = (await client.post("/v1/media", content=png())).json()
    redis.zadd(EXPIRY_KEY, {media["id"]: time.time() + 5})
    await client.post("/v1/answer", json=question(image={"id": media["id"]}))
    assert present(redis.zscore(EXPIRY_KEY, media["id"])) > time.time() + 3600


async def test_a_front_end_sweeps_by_itself(
    make_settings: MakeSettings, redis: Redis, media_directory: Path
) -> None:
    """In the background while it serves."""
    async with serving(make_settings(media_sweep_s=0.02)) as client:
        media = (await client.post("/v1/media", content=png())).json()
        path = media_directory / media_path(media["id"])
        assert path.exists()
        expire(redis, media["id"])
        await until(lambda: not path.exists())


async def test_one_of_several_front_ends_sweeps(parts: Parts) -> None:
    """The lease in Redis goes to one of them, and anew when it has run out."""
    assert [await parts.shelf.first_within("sweep", 60) for _ in range(3)] == [True, False, False]
    assert await parts.shelf.first_within("other", 0.001)
    await asyncio.sleep(0.01)
    assert await parts.shelf.first_within("other", 0.001)


async def test_a_claim_waits_for_a_deletion_and_puts_the_bytes_there_again(
    parts: Parts, redis: Redis, media_directory: Path
) -> None:
    """Between the decision to delete and the deletion nobody may rely on the bytes."""
    media_id = await parts.upload(png())
    expire(redis, media_id)
    due, ours_until = await parts.shelf.due()
    again = asyncio.create_task(parts.upload(png()))
    await asyncio.sleep(0.1)
    assert not again.done()
    assert await parts.sweeper._delete(due, ours_until) == [media_id]
    await parts.shelf.deleted(due, ours_until)
    assert await again == media_id
    assert (media_directory / media_path(media_id)).exists()
    assert await parts.sweeper.sweep() == 0


async def test_what_was_uploaded_while_a_sweep_ran_is_there_afterwards(
    parts: Parts, redis: Redis, media_directory: Path
) -> None:
    """Whichever came first, many times over."""
    media_id = await parts.upload(png())
    for _ in range(40):
        expire(redis, media_id)
        await asyncio.gather(*(parts.sweeper.sweep() for _ in range(2)), parts.upload(png()))
        assert (media_directory / media_path(media_id)).exists()


async def test_a_deletion_that_its_front_end_did_not_live_to_finish_is_finished_by_another(
    parts: Parts, redis: Redis, media_directory: Path
) -> None:
    """And media that are claimed in the meantime are kept."""
    dead, kept = await parts.upload(png(color="red")), await parts.upload(png(color="blue"))
    for media_id in (dead, kept):
        redis.zrem(EXPIRY_KEY, media_id)
        redis.zadd(DELETING_KEY, {media_id: time.time() - 1})
    await parts.upload(png(color="blue"))
    assert await parts.sweeper.sweep() == 1
    assert {path.name for path in (media_directory / "media").iterdir()} == {kept}


async def test_a_sweep_that_the_store_holds_up_ends_while_nobody_else_may_claim(
    parts: Parts, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is deleted after that may be somebody's again; what was deleted until then is said to be."""
    media = {await parts.upload(png(color=color)) for color in ("red", "blue", "green")}
    for media_id in media:
        expire(redis, media_id)
    asked = []

    async def delete(path: str) -> None:
        asked.append(path)
        if len(asked) == 2:
            await asyncio.Event().wait()

    monkeypatch.setattr("service.shelf.DELETING_S", SPARE_S + 0.5)
    monkeypatch.setattr(parts.sweeper, "_store", SimpleNamespace(delete_async=delete))
    async with asyncio.timeout(30):
        assert await parts.sweeper.sweep() == 1
    assert len(asked) == 2
    left = {media_id for media_id in media if redis.exists(media_key(media_id))}
    assert {media_path(media_id) for media_id in media - left} == {asked[0]}
    assert set(redis.zrange(DELETING_KEY, 0, -1)) == left


async def test_what_was_claimed_since_its_deletion_ran_out_keeps_its_entry(
    parts: Parts, redis: Redis
) -> None:
    """Also while another front end deletes it anew: until that has said so, nobody may claim it."""
    media_id = await parts.upload(png())
    expire(redis, media_id)
    ids, ours_until = await parts.shelf.due()
    redis.zadd(DELETING_KEY, {media_id: time.time() - 1})
    await parts.upload(png())
    await parts.shelf.deleted(ids, ours_until)
    assert await parts.shelf.facts(media_id, ALICE)
    expire(redis, media_id)
    assert (await parts.shelf.due())[0] == [media_id]
    await parts.shelf.deleted(ids, ours_until)
    assert redis.zscore(DELETING_KEY, media_id)
    assert await parts.shelf.facts(media_id, ALICE)


async def test_a_deletion_that_hangs_fails_the_claim_in_the_end(
    parts: Parts, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """503, rather than to wait for ever."""
    monkeypatch.setattr("service.shelf.CLAIM_WITHIN_S", 0.1)
    media_id = await parts.upload(png())
    redis.zadd(DELETING_KEY, {media_id: time.time() + 100})
    with pytest.raises(StoreAwayError):
        await parts.upload(png())


async def test_media_that_went_between_question_and_claim_are_unknown(
    parts: Parts, media_directory: Path
) -> None:
    """By id there are no bytes to put there again."""
    media_id = await parts.upload(png())
    ref = MediaRef(id=media_id, media_type="image/png", modality="image", size_bytes=len(png()))
    (media_directory / media_path(media_id)).unlink()
    with pytest.raises(UnknownMediaError):
        await parts.media.keep([Intake(ref, None)], ALICE)


async def test_media_that_the_broker_has_forgotten_are_deleted_in_time(
    make_settings: MakeSettings, redis: Redis, media_directory: Path
) -> None:
    """A broker that lost its file leaves no bytes behind for ever; other files stay."""
    settings = make_settings(media_ttl_s=0.2, max_deadline_s=0.1, deadline_s=0.1)
    async with _redis(settings) as connected:
        parts = Parts(connected, settings)
        await parts.upload(png())
        (media_directory / "media" / "README").write_text("not ours")
        redis.flushall()
        await parts.sweeper.adopt_strays()
        assert await parts.sweeper.sweep() == 0  # not old enough
        await asyncio.sleep(1.3)  # a file's time of change may be in whole seconds
        await parts.sweeper.adopt_strays()
        assert await parts.sweeper.sweep() == 1
    assert [path.name for path in (media_directory / "media").iterdir()] == ["README"]


@pytest.mark.parametrize("multipart", [False, True])
async def test_a_full_disk_is_a_clear_refusal(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch, *, multipart: bool
) -> None:
    """503 and when to come again, for the body itself and for a part of a form."""

    def full(**_: Any) -> IO[bytes]:
        return Path("/dev/full").open("wb", buffering=0)

    monkeypatch.setattr("service.uploads.spooled_file", full)
    monkeypatch.setattr("starlette.formparsers.SpooledTemporaryFile", full)
    sent: dict[str, Any] = {"files": {"file": png()}} if multipart else {"content": png()}
    response = await client.post("/v1/media", **sent)
    assert response.status_code == 503, response.text
    assert response.json()["type"].endswith("/media-store-away")
    assert int(response.headers["Retry-After"]) > 0
