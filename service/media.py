"""Media on their way in: told apart by first bytes, measured by header, stored once under their hash.

Nothing is decoded here; a header that lies is found by the worker, which decodes in safety.
"""

from __future__ import annotations

import asyncio
import base64
import errno
import hashlib
import io
import tempfile
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any, cast

from anyio import to_thread
from obstore.exceptions import BaseError
from obstore.store import from_url
from PIL import ExifTags, Image
from starlette.datastructures import UploadFile

from service.errors import (
    InvalidRequestError,
    MediaTooLargeError,
    StoreAwayError,
    UndecodableMediaError,
    UnknownMediaError,
    UnsupportedMediaError,
    UrlNotFetchedError,
)
from service.long_texts import DataUri
from service.schemas import MediaById, MediaByUrl
from worker.contract import MediaRef, media_path

if TYPE_CHECKING:
    from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator

    from obstore.store import ObjectStore

    from service.fetch import Fetcher
    from service.keys import Caller
    from service.schemas import AnswerRequest, Media
    from service.settings import ServiceSettings
    from service.shelf import Shelf
    from worker.contract import Modality

CHUNK = 1024 * 1024
HEAD = 4096
"""Bytes that are enough to tell the formats apart."""

_PILLOW = {
    "image/png": "PNG",
    "image/jpeg": "JPEG",
    "image/webp": "WEBP",
    "image/gif": "GIF",
    "image/bmp": "BMP",
}
IMAGE_TYPES = tuple(_PILLOW)
VIDEO_TYPES = (
    "video/mp4",
    "video/webm",
    "video/quicktime",
    "video/x-matroska",
    "video/x-msvideo",
    "image/gif",
)
_ALLOWED: dict[Modality, tuple[str, ...]] = {"image": IMAGE_TYPES, "video": VIDEO_TYPES}
_DECODED = ("width", "height", "frames")
_LYING = (5, 6, 7, 8)
"""EXIF orientations of pictures that are stored on their side."""
_STILL_BRANDS = (b"avif", b"avis", b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1")


def sniff(head: bytes) -> str | None:
    """The media type that the first bytes of a file speak of; None for every format not allowed."""
    for magic, media_type in (
        (b"\x89PNG\r\n\x1a\n", "image/png"),
        (b"\xff\xd8\xff", "image/jpeg"),
        (b"GIF87a", "image/gif"),
        (b"GIF89a", "image/gif"),
        (b"BM", "image/bmp"),
    ):
        if head.startswith(magic):
            return media_type
    if head.startswith(b"RIFF"):
        return {b"WEBP": "image/webp", b"AVI ": "video/x-msvideo"}.get(head[8:12])
    if head.startswith(b"\x1aE\xdf\xa3"):  # EBML: its DocType follows within the header
        return (
            "video/webm" if b"webm" in head[:64] else "video/x-matroska" if b"matroska" in head[:64] else None
        )
    return _sniff_boxes(head)


def _sniff_boxes(head: bytes) -> str | None:
    """ISO base media (MP4) and its ancestor QuickTime: a size, then the name of the first box."""
    if head[4:8] == b"ftyp":
        brand = head[8:12]
        return None if brand in _STILL_BRANDS else "video/quicktime" if brand == b"qt  " else "video/mp4"
    return "video/quicktime" if head[4:8] in (b"moov", b"mdat", b"wide", b"free", b"skip") else None


@dataclass(frozen=True, slots=True)
class Intake:
    """One accepted file, and its bytes unless they came as the id of stored media."""

    ref: MediaRef
    file: IO[bytes] | None


def open_store(url: str) -> ObjectStore:
    """The media store at `url`; a directory is made if it is missing."""
    return from_url(url, mkdir=True) if url.startswith("file:") else from_url(url)


@dataclass(frozen=True, slots=True)
class Upload:
    """What `/v1/media` tells of an upload. Sizes in pixels, upright; None where only decoding would tell."""

    id: str
    media_type: str
    bytes: int
    width: int | None
    height: int | None
    frames: int | None
    expires_at: float


async def spool(chunks: AsyncIterable[bytes], file: IO[bytes], limit: Callable[[bytes], int]) -> None:
    """Writes `chunks` to `file` as they come. Raises what `limit` raises, `MediaTooLargeError` beyond it.

    `limit` is asked once, when the file's first `HEAD` bytes are there: they decide what may follow.
    """
    head, size, most = b"", 0, None
    async for chunk in chunks:
        size += len(chunk)
        if most is None:
            head += chunk[: HEAD - len(head)]
            most = limit(head) if len(head) == HEAD else None
        if most is not None and size > most:
            raise MediaTooLargeError(f"Files of this type may have at most {most} bytes.")
        with room_on_disk():
            await to_thread.run_sync(file.write, chunk)


@contextmanager
def room_on_disk() -> Iterator[None]:
    """Raises `StoreAwayError` where what the block writes does not fit."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise StoreAwayError("There is no room for another upload now.") from error


class MediaStore:
    """What the front end does with media. The work is done in threads: nothing here blocks the loop."""

    def __init__(self, store: ObjectStore, shelf: Shelf, fetcher: Fetcher, settings: ServiceSettings) -> None:
        self._store = store
        self._shelf = shelf
        self._fetcher = fetcher
        self._settings = settings

    @asynccontextmanager
    async def intake(self, request: AnswerRequest, caller: Caller) -> AsyncIterator[tuple[Intake, ...]]:
        """Type, size, pixels and hash of everything in `request`; raises for the first that is refused.

        What was fetched is open, and on disk, until the context ends.
        """
        modality: Modality = "image" if request.video is None else "video"
        sources = _sources(request)
        if len(sources) > self._settings.max_images:
            raise InvalidRequestError(f"images: at most {self._settings.max_images} images in one request")
        async with AsyncExitStack() as closing:
            files = await self._fetch(sources, modality, closing)
            for field, source in sources.items():
                if isinstance(source, MediaById) and await self._shelf.facts(source.id, caller) is None:
                    raise _unknown(field)
            yield await to_thread.run_sync(
                lambda: tuple(
                    self._inspect(files.get(field, source), field, modality)
                    for field, source in sources.items()
                )
            )

    async def keep(self, intakes: Iterable[Intake], caller: Caller) -> None:
        """Writes what the store does not have yet, and keeps all of it for `caller`.

        Raises `StoreAwayError`, `BrokerAwayError`, or `UnknownMediaError` for what has just expired.
        """
        await self._shelf.claim((intake.ref for intake in intakes), caller)
        await to_thread.run_sync(self._keep, intakes)

    async def upload(self, file: IO[bytes], caller: Caller) -> Upload:
        """Stores one complete file, which `caller` may then refer to. Raises as `intake` and `keep` do."""
        ref, size = await to_thread.run_sync(self._measure_upload, file)
        expires_at = await self._shelf.claim((ref,), caller)
        await to_thread.run_sync(self._keep, (Intake(ref, file),))
        known: dict[str, Any] = await self._shelf.facts(ref.id, caller) or {}  # a worker may have decoded it
        width, height, frames = (int(known[each]) if each in known else None for each in _DECODED)
        if size is not None:
            width, height, frames = *size, frames if ref.media_type == "image/gif" else 1
        return Upload(ref.id, ref.media_type, ref.size_bytes, width, height, frames, expires_at)

    def upload_limit(self, head: bytes) -> int:
        """Bytes that a file may have which begins with `head`. Raises `UnsupportedMediaError`."""
        media_type = _allowed_type(head, "file", *_ALLOWED)
        video = media_type in VIDEO_TYPES  # a GIF may be meant as either
        return self._settings.max_video_bytes if video else self._settings.max_image_bytes

    def _measure_upload(self, file: IO[bytes]) -> tuple[MediaRef, tuple[int, int] | None]:
        file.seek(0)
        limit = self.upload_limit(head := file.read(HEAD))
        if (size := file.seek(0, io.SEEK_END)) > limit:
            raise MediaTooLargeError(f"Files of this type may have at most {limit} bytes.")
        modality: Modality = "image" if sniff(head) in IMAGE_TYPES else "video"
        return self._measured(file, head, "file", modality, size)

    async def _fetch(
        self, sources: dict[str, Media], modality: Modality, closing: AsyncExitStack
    ) -> dict[str, IO[bytes]]:
        """The media that come by URL, by field, in files that `closing` closes."""
        limit, files = self._limit(modality), dict[str, IO[bytes]]()
        try:
            async with asyncio.timeout(self._settings.fetch_timeout_s):
                for field, source in sources.items():
                    if not isinstance(source, MediaByUrl):
                        continue
                    files[field] = file = closing.enter_context(spooled_file())
                    async with aclosing(self._fetcher.stream(source.url, field, limit)) as chunks:
                        await spool(chunks, file, lambda _: limit)
        except TimeoutError:
            raise UrlNotFetchedError(f"{field}: the URL could not be fetched in time.") from None
        return files

    def _inspect(self, source: Media | IO[bytes], field: str, modality: Modality) -> Intake:
        if isinstance(source, MediaById):
            return Intake(self._stored(source.id, field, modality), None)
        file = self._decode(source, field, modality) if isinstance(source, (str, DataUri)) else _file(source)
        return Intake(self._measure(file, field, modality), file)

    def _measure(self, file: IO[bytes], field: str, modality: Modality) -> MediaRef:
        size = file.seek(0, io.SEEK_END)
        self._check_size(size, field, modality)
        file.seek(0)
        return self._measured(file, file.read(HEAD), field, modality, size)[0]

    def _measured(
        self, file: IO[bytes], head: bytes, field: str, modality: Modality, size: int
    ) -> tuple[MediaRef, tuple[int, int] | None]:
        """The reference to `file`, and its width and height if it is taken as a picture."""
        media_type, pixels = _allowed_type(head, field, modality), None
        if modality == "image":
            pixels = _check_pixels(file, media_type, field, self._settings.max_image_pixels)
        file.seek(0)
        return MediaRef(id=_sha256(file), media_type=media_type, modality=modality, size_bytes=size), pixels

    def _limit(self, modality: Modality) -> int:
        return self._settings.max_image_bytes if modality == "image" else self._settings.max_video_bytes

    def _check_size(self, size: int, field: str, modality: Modality) -> None:
        if size > (limit := self._limit(modality)):
            raise MediaTooLargeError(f"{field}: {modality}s may have at most {limit} bytes.")

    def _decode(self, uri: str | DataUri, field: str, modality: Modality) -> IO[bytes]:
        payload: str | memoryview
        if isinstance(uri, DataUri):
            header, payload, size = uri.header, uri.payload, uri.size
        else:
            header, _, payload = uri.partition(",")
            size = len(payload)
        if not (header[:5].lower() == "data:" and header[-7:].lower() == ";base64"):
            raise InvalidRequestError(f"{field}: must be a data URI such as data:image/png;base64,...")
        self._check_size(size // 4 * 3 - 2, field, modality)  # before a copy of it is made
        try:
            return _decoded(payload)
        except ValueError:
            raise InvalidRequestError(f"{field}: the data URI is not valid base64") from None

    def _stored(self, media_id: str, field: str, modality: Modality) -> MediaRef:
        path = media_path(media_id)
        try:
            size = self._store.head(path)["size"]
            head = self._store.get_range(path, start=0, length=min(size, HEAD)).to_bytes()
        except FileNotFoundError:
            raise _unknown(field) from None
        except BaseError as error:
            raise StoreAwayError("Stored media cannot be read now.") from error
        self._check_size(size, field, modality)
        media_type = _allowed_type(head, field, modality)
        return MediaRef(id=media_id, media_type=media_type, modality=modality, size_bytes=size)

    def _keep(self, intakes: Iterable[Intake]) -> None:
        try:
            for intake in intakes:
                path = media_path(intake.ref.id)
                if self._has(path):
                    continue
                if intake.file is None:
                    raise _unknown("media")
                intake.file.seek(0)
                self._store.put(path, intake.file)
        except (BaseError, OSError) as error:
            raise StoreAwayError("Media cannot be stored now.") from error

    def _has(self, path: str) -> bool:
        try:
            self._store.head(path)
        except FileNotFoundError:
            return False
        return True


def _sources(request: AnswerRequest) -> dict[str, Media]:
    """The media of `request` by the name that errors call them."""
    if request.images is not None:
        return {f"images[{index}]": media for index, media in enumerate(request.images)}
    one = {"image": request.image, "video": request.video}
    return {field: media for field, media in one.items() if media is not None}


def _decoded(payload: str | memoryview) -> io.BytesIO:
    """What the base64 stands for, by pieces: while one is decoded no other thread runs. Raises ValueError.

    payload: text, or bytes of JSON, in which `/` may be escaped.
    """
    file, carried, padded = io.BytesIO(), b"", False
    for start in range(0, len(payload), CHUNK):
        piece = payload[start : start + CHUNK]
        text = piece.encode("ascii") if isinstance(piece, str) else bytes(piece).replace(b"\\", b"")
        carried += text
        whole = len(carried) // 4 * 4
        if whole and padded:
            raise ValueError("padding before the end")
        data = base64.b64decode(carried[:whole], validate=True)
        padded = len(data) < whole // 4 * 3
        file.write(data)
        carried = carried[whole:]
    if carried:
        raise ValueError("characters at the end that are no whole group")
    return file


def _sha256(file: IO[bytes]) -> str:
    digest = hashlib.sha256()
    while chunk := file.read(CHUNK):
        digest.update(chunk)
    return digest.hexdigest()


def _unknown(field: str) -> UnknownMediaError:
    return UnknownMediaError(f"{field}: no media of this id is stored.")


def _file(source: Media | IO[bytes]) -> IO[bytes]:
    """The file of an upload's part, or what was fetched in a URL's place."""
    return source.file if isinstance(source, UploadFile) else cast("IO[bytes]", source)


def spooled_file() -> tempfile.SpooledTemporaryFile[bytes]:
    """A nameless file that is in memory while it is small."""
    return tempfile.SpooledTemporaryFile(max_size=CHUNK)


def _allowed_type(head: bytes, field: str, *modalities: Modality) -> str:
    media_type = sniff(head)
    allowed = tuple(dict.fromkeys(each for modality in modalities for each in _ALLOWED[modality]))
    if media_type not in allowed:
        found = f"{media_type} is" if media_type else "the file's first bytes are"
        raise UnsupportedMediaError(f"{field}: {found} none of {', '.join(allowed)}.")
    return media_type


def _check_pixels(file: IO[bytes], media_type: str, field: str, limit: int) -> tuple[int, int]:
    """Width and height, upright, from the header: Pillow decodes on first use of the pixels: never here."""
    too_large = f"{field}: images may have at most {limit} pixels."
    try:
        with Image.open(file, formats=[_PILLOW[media_type]]) as image:
            width, height = image.size
            lying = _orientation(image) in _LYING
    except Image.DecompressionBombError as error:
        raise MediaTooLargeError(too_large) from error
    except Exception as error:  # Pillow's header parsers raise whatever a broken header leads them into
        raise UndecodableMediaError(f"{field}: the header of this {media_type} cannot be read.") from error
    if width * height > limit:
        raise MediaTooLargeError(too_large)
    return (height, width) if lying else (width, height)


def _orientation(image: Image.Image) -> int | None:
    """EXIF's orientation if the header has one; `image.getexif` would decode some files to look for it."""
    exif = Image.Exif()
    try:
        exif.load(image.info.get("exif", b""))
        orientation: int | None = exif.get(ExifTags.Base.Orientation)
    except Exception:  # noqa: BLE001 - as above, but a broken tag is no reason to refuse a picture
        return None
    return orientation
