"""Media on their way in: told apart by first bytes, measured by header, stored once under their hash.

Nothing is decoded here; a header that lies is found by the worker, which decodes in safety.
"""

from __future__ import annotations

import base64
import hashlib
import io
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING

from anyio import to_thread
from obstore.exceptions import BaseError
from obstore.store import from_url
from PIL import Image

from service.errors import (
    InvalidRequestError,
    MediaTooLargeError,
    StoreAwayError,
    UndecodableMediaError,
    UnknownMediaError,
    UnsupportedMediaError,
    UrlNotAllowedError,
)
from service.schemas import MediaById, MediaByUrl
from worker.contract import MediaRef, media_path

if TYPE_CHECKING:
    from collections.abc import Iterable

    from obstore.store import ObjectStore

    from service.schemas import AnswerRequest, Media
    from service.settings import ServiceSettings
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


class MediaStore:
    """What the front end does with media. The work is done in threads: nothing here blocks the loop."""

    def __init__(self, store: ObjectStore, settings: ServiceSettings) -> None:
        self._store = store
        self._settings = settings

    async def inspect(self, request: AnswerRequest) -> tuple[Intake, ...]:
        """Type, size, pixels and hash of everything in `request`; raises for the first that is refused."""
        modality: Modality = "image" if request.video is None else "video"
        sources = _sources(request)
        if len(sources) > self._settings.max_images:
            raise InvalidRequestError(f"images: at most {self._settings.max_images} images in one request")
        return await to_thread.run_sync(
            lambda: tuple(self._inspect(source, field, modality) for field, source in sources.items())
        )

    async def keep(self, intakes: Iterable[Intake]) -> None:
        """Writes what the store does not have yet. Raises `StoreAwayError`."""
        await to_thread.run_sync(self._keep, intakes)

    def _inspect(self, source: Media, field: str, modality: Modality) -> Intake:
        if isinstance(source, MediaByUrl):
            raise UrlNotAllowedError(f"{field}: this server fetches no media; send a data URI or a file.")
        if isinstance(source, MediaById):
            return Intake(self._stored(source.id, field, modality), None)
        file = self._decode(source, field, modality) if isinstance(source, str) else source.file
        return Intake(self._measure(file, field, modality), file)

    def _measure(self, file: IO[bytes], field: str, modality: Modality) -> MediaRef:
        size = file.seek(0, io.SEEK_END)
        self._check_size(size, field, modality)
        file.seek(0)
        media_type = _allowed_type(file.read(HEAD), field, modality)
        if modality == "image":
            _check_pixels(file, media_type, field, self._settings.max_image_pixels)
        file.seek(0)
        return MediaRef(id=_sha256(file), media_type=media_type, modality=modality, size_bytes=size)

    def _check_size(self, size: int, field: str, modality: Modality) -> None:
        limit = self._settings.max_image_bytes if modality == "image" else self._settings.max_video_bytes
        if size > limit:
            raise MediaTooLargeError(f"{field}: {modality}s may have at most {limit} bytes.")

    def _decode(self, uri: str, field: str, modality: Modality) -> IO[bytes]:
        header, _, payload = uri.partition(",")
        if not (header[:5].lower() == "data:" and header[-7:].lower() == ";base64"):
            raise InvalidRequestError(f"{field}: must be a data URI such as data:image/png;base64,...")
        self._check_size(len(payload) // 4 * 3 - 2, field, modality)  # before a copy of it is made
        try:
            return io.BytesIO(base64.b64decode(payload, validate=True))
        except ValueError:
            raise InvalidRequestError(f"{field}: the data URI is not valid base64") from None

    def _stored(self, media_id: str, field: str, modality: Modality) -> MediaRef:
        path = media_path(media_id)
        try:
            size = self._store.head(path)["size"]
            head = self._store.get_range(path, start=0, length=min(size, HEAD)).to_bytes()
        except FileNotFoundError:
            raise UnknownMediaError(f"{field}: no media of this id is stored.") from None
        except BaseError as error:
            raise StoreAwayError("Stored media cannot be read now.") from error
        self._check_size(size, field, modality)
        media_type = _allowed_type(head, field, modality)
        return MediaRef(id=media_id, media_type=media_type, modality=modality, size_bytes=size)

    def _keep(self, intakes: Iterable[Intake]) -> None:
        try:
            for intake in intakes:
                path = media_path(intake.ref.id)
                if intake.file is not None and not self._has(path):
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


def _sha256(file: IO[bytes]) -> str:
    digest = hashlib.sha256()
    while chunk := file.read(CHUNK):
        digest.update(chunk)
    return digest.hexdigest()


def _allowed_type(head: bytes, field: str, modality: Modality) -> str:
    media_type = sniff(head)
    if media_type not in _ALLOWED[modality]:
        found = f"{media_type} is" if media_type else "the file's first bytes are"
        raise UnsupportedMediaError(f"{field}: {found} none of {', '.join(_ALLOWED[modality])}.")
    return media_type


def _check_pixels(file: IO[bytes], media_type: str, field: str, limit: int) -> None:
    """Reads the header only: Pillow decodes on first use of the pixels, which never comes."""
    too_large = f"{field}: images may have at most {limit} pixels."
    try:
        with Image.open(file, formats=[_PILLOW[media_type]]) as image:
            width, height = image.size
    except Image.DecompressionBombError as error:
        raise MediaTooLargeError(too_large) from error
    except Exception as error:  # Pillow's header parsers raise whatever a broken header leads them into
        raise UndecodableMediaError(f"{field}: the header of this {media_type} cannot be read.") from error
    if width * height > limit:
        raise MediaTooLargeError(too_large)
