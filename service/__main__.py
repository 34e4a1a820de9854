"""`python -m service`: the front end on `PRISM_HOST`:`PRISM_PORT`, as containers and `make serve` run it."""

from __future__ import annotations

import argparse
import asyncio
import sys
from typing import TYPE_CHECKING

import uvicorn
from pydantic import ValidationError

from service import logs
from service.app import create_app
from service.heads import bounded
from service.keys import WHY_NOT, may_listen
from service.leaving import last_requests
from service.settings import ServiceSettings
from worker.contract import complaints

if TYPE_CHECKING:
    import socket

    from fastapi import FastAPI

    from service.context import Context

LAST_WORDS_S = 1.0
"""So long before the grace ends those who wait are told that the server stops."""


def server(settings: ServiceSettings) -> uvicorn.Server:
    """The server of one process, without an access log: `service.middleware` writes one line a request."""
    app = create_app(settings)
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        http=bounded(settings),
        log_config=None,
        access_log=False,
        server_header=False,
        limit_concurrency=settings.max_connections,
        timeout_graceful_shutdown=settings.grace_s,
    )
    return _Server(config, app, settings)


class _Server(uvicorn.Server):
    """Has its connections on the metrics page: what it refuses for their number never reaches `app`.

    Told to exit, it answers what is on its way, and has those who wait answered before uvicorn cuts them off.
    """

    def __init__(self, config: uvicorn.Config, app: FastAPI, settings: ServiceSettings) -> None:
        super().__init__(config)
        self._app = app
        self._settings = settings

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        here: Context = self._app.state.context
        here.metrics.watch_connections(
            lambda: len(self.server_state.connections), self._settings.max_connections
        )

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        here: Context = self._app.state.context
        left_s = max(self._settings.grace_s - LAST_WORDS_S, 0)
        telling = asyncio.get_running_loop().call_later(left_s, here.jobs.stop_waiting)
        try:
            await last_requests(self)
            await super().shutdown(sockets)
        finally:
            telling.cancel()


def main() -> int:
    """Serves until SIGTERM. Returns 2 for a bad setting, 1 if the server could not start."""
    try:
        settings = ServiceSettings()
    except ValidationError as error:
        sys.stderr.write("\n".join((*complaints(error), "")))
        return 2
    if not may_listen(settings, settings.host):
        sys.stderr.write(f"{WHY_NOT}\n")
        return 2
    logs.configure(settings)
    running = server(settings)
    running.run()
    return 0 if running.started else 1


if __name__ == "__main__":
    argparse.ArgumentParser(
        prog="python -m service",
        description="Serves the HTTP API of one front end until SIGTERM.",
        epilog="Settings are environment variables, such as PRISM_PORT: docs/settings.md.",
    ).parse_args()
    sys.exit(main())
