"""The media store as a worker sees it: bytes by content id."""

from __future__ import annotations

from typing import TYPE_CHECKING

from obstore.store import from_url

from worker.contract import MediaRef, media_path
from worker.errors import MediaNotFoundError

if TYPE_CHECKING:
    from obstore.store import ObjectStore


class MediaStore:
    """Reads what the front end has written. `url`: `file://`, `s3://`, `gs://`, `az://` or `memory://`."""

    def __init__(self, url: str) -> None:
        self._store: ObjectStore = from_url(url)

    def read(self, ref: MediaRef) -> bytes:
        """The bytes of `ref`. Raises `MediaNotFoundError`."""
        try:
            return self._store.get(media_path(ref.id)).bytes().to_bytes()
        except FileNotFoundError as error:
            raise MediaNotFoundError(f"Media {ref.id} is no longer stored; upload it again.") from error
