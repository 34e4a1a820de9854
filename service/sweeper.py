"""Deletes media that have expired. Every front end runs it; a lease in Redis lets one at a time work."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from anyio import to_thread
from obstore.exceptions import BaseError

from service.errors import BrokerAwayError
from service.tasks import in_background
from worker.contract import media_path

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from obstore.store import ObjectStore

    from service.settings import ServiceSettings
    from service.shelf import Shelf

logger = logging.getLogger(__name__)

STRAYS_EVERY_S = 3600
SPARE_S = 60.0
"""Of the time in which nobody else claims what is deleted: clocks differ, and a request may be under way."""
_ID = re.compile(r"[0-9a-f]{64}")


class Sweeper:
    """The front end's background task."""

    def __init__(self, store: ObjectStore, shelf: Shelf, settings: ServiceSettings) -> None:
        self._store = store
        self._shelf = shelf
        self._every_s = settings.media_sweep_s
        self._ttl = timedelta(seconds=settings.media_ttl_s)

    @asynccontextmanager
    async def sweeping(self) -> AsyncIterator[None]:
        """Sweeps while this context lasts."""
        async with in_background(self._run()):
            yield

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self._every_s)
            try:
                if await self._shelf.first_within("sweep", 0.9 * self._every_s):
                    await self.sweep()
                if await self._shelf.first_within("strays", STRAYS_EVERY_S):
                    await self.adopt_strays()
            except (BrokerAwayError, BaseError, OSError) as error:
                logger.warning("expired media are left for later: %s", type(error).__name__)

    async def sweep(self) -> int:
        """Deletes all that is due and returns how many. What the store keeps is tried again later."""
        count = 0
        while True:
            ids, until = await self._shelf.due()
            done = await self._delete(ids, until - SPARE_S)
            await self._shelf.deleted(done, until)
            count += len(done)
            if not ids or len(done) < len(ids):
                break
        if count:
            logger.info("%d expired media deleted", count)
        return count

    async def _delete(self, ids: list[str], until: float) -> list[str]:
        """Deletes the bytes of `ids` as long as it is not later than `until`; returns those that are gone."""
        done = list[str]()
        try:
            async with asyncio.timeout(until - time.time()):
                for media_id in ids:
                    with suppress(FileNotFoundError):  # never written, or deleted by one who died then
                        await self._store.delete_async(media_path(media_id))
                    done.append(media_id)
        except TimeoutError:
            logger.warning("the media store is slow: expired media are left for later")
        return done

    async def adopt_strays(self) -> None:
        """Lets media expire that have lain in the store for their time though no entry says until when."""
        pages = await to_thread.run_sync(lambda: list(self._strays()))
        for ids in pages:
            await self._shelf.adopt(ids)

    def _strays(self) -> Iterator[list[str]]:
        """Ids of media that were written long enough ago, page by page; those with an entry keep theirs."""
        before = datetime.now(UTC) - self._ttl
        for page in self._store.list(media_path("")):
            names = {each["path"].rpartition("/")[2] for each in page if each["last_modified"] < before}
            if ids := [name for name in names if _ID.fullmatch(name)]:
                yield ids
