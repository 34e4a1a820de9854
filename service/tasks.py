"""Work that goes on beside the requests for as long as the process serves."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Coroutine


@asynccontextmanager
async def in_background(work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Runs `work` while the block runs, and ends it then; an error that ends it is asyncio's to log."""
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        while not task.done():  # before Python 3.12 `wait_for`, in redis-py, may swallow a cancellation
            task.cancel()
            await asyncio.wait([task], timeout=0.1)
