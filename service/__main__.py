"""`python -m service`: the front end on `PRISM_HOST`:`PRISM_PORT`, as containers and `make serve` run it."""

from __future__ import annotations

import sys

import uvicorn
from pydantic import ValidationError

from service import logs
from service.app import create_app
from service.keys import WHY_NOT, may_listen
from service.settings import ServiceSettings
from worker.contract import complaints


def server(settings: ServiceSettings) -> uvicorn.Server:
    """The server of one process, without an access log: `service.middleware` writes one line a request."""
    config = uvicorn.Config(
        create_app(settings),
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=False,
        server_header=False,
        limit_concurrency=settings.max_connections,
        timeout_graceful_shutdown=settings.grace_s,
    )
    return uvicorn.Server(config)


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
    sys.exit(main())
