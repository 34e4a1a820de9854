"""The media store as a worker sees it: bytes by content id."""

from __future__ import annotations

import logging
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from obstore.exceptions import BaseError
from obstore.store import LocalStore, from_url

from worker.contract import MediaRef, media_path
from worker.errors import MediaNotFoundError, StoreAwayError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from obstore.store import ObjectStore


log = logging.getLogger(__name__)


class MediaStore:
    """Reads what the front end has written. `url`: `file://`, `s3://`, `gs://`, `az://` or `memory://`.

    What a distant store does not answer at once is asked for again by obstore, for some minutes.
    """

    def __init__(self, url: str) -> None:
        self._store: ObjectStore = from_url(url)

    def read(self, ref: MediaRef) -> bytes:
        """The bytes of `ref`. Raises `MediaNotFoundError` and `StoreAwayError`."""
        with _told(ref):
            return self._store.get(media_path(ref.id)).bytes().to_bytes()

    @contextmanager
    def file(self, ref: MediaRef) -> Iterator[Path]:
        """A file with the bytes of `ref`, which are never in memory at once: a video may have hundreds of MB.

        Raises `MediaNotFoundError` and `StoreAwayError`.
        """
        path = media_path(ref.id)
        if isinstance(self._store, LocalStore):
            with _told(ref):
                self._store.head(path)
            yield Path(str(self._store.prefix)) / path
            return
        with tempfile.NamedTemporaryFile() as spool:
            with _told(ref):
                for chunk in self._store.get(path).stream():
                    spool.write(chunk)
            spool.flush()
            yield Path(spool.name)


@contextmanager
def _told(ref: MediaRef) -> Iterator[None]:
    """Turns what obstore raises into what a caller may be told."""
    try:
        yield
    except FileNotFoundError as error:
        raise MediaNotFoundError(f"Media {ref.id} is no longer stored; upload it again.") from error
    except BaseError as error:
        log.warning("the media store gives nothing: %s", type(error).__name__)
        raise StoreAwayError("The media store does not give the media now.") from error
