"""`python -m service.serve`: exit code 0 when asked to stop, 1 when it cannot go on, 2 for a bad setting."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys

from pydantic import ValidationError

from service.keys import WHY_NOT, may_listen
from service.serve.errors import ServeError, UnguardedError
from service.serve.machine import claim, require_free_port
from service.serve.settings import ServeSettings
from service.serve.stack import bring_up, say
from service.serve.tree import ProcessTree
from worker.contract import complaints


async def serve(settings: ServeSettings, *, with_parent: bool) -> None:
    """Run the whole stack until SIGINT, SIGTERM or SIGHUP. Raises ServeError when it cannot go on."""
    async with ProcessTree() as tree:
        _listen(tree)
        parent = asyncio.create_task(_end_with_parent(tree)) if with_parent else None
        try:
            await tree.supervise(bring_up(tree, settings))
        finally:
            if parent:
                parent.cancel()
            say("\nStopping: front end, worker, broker (Ctrl-C again: at once)")
    say("Stopped, nothing is left running.")


def _listen(tree: ProcessTree) -> None:
    loop = asyncio.get_running_loop()
    for each in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(each, tree.interrupt)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # it is under nohup
        loop.add_signal_handler(signal.SIGHUP, tree.interrupt)


async def _end_with_parent(tree: ProcessTree) -> None:
    parent = os.getppid()
    while os.getppid() == parent:  # noqa: ASYNC110 (the system gives no notice of it)
        await asyncio.sleep(1)
    tree.interrupt()


def _end_with_parent_asked() -> bool:
    parser = argparse.ArgumentParser(
        prog="python -m service.serve",
        description="Runs broker, worker and front end until Ctrl-C, as `make serve` does.",
        epilog="Settings are environment variables, such as PRISM_PORT and PRISM_MODEL: docs/settings.md.",
    )
    parser.add_argument(
        "--end-with-parent", action="store_true", help="stop when whoever started it is gone, as make may be"
    )
    return bool(parser.parse_args().end_with_parent)


def main() -> int:
    """Serves until told to stop; returns the exit code."""
    with_parent = _end_with_parent_asked()
    try:
        settings = ServeSettings()
        if not may_listen(settings, settings.host):
            raise UnguardedError(WHY_NOT)
        with claim(settings.data_dir):
            require_free_port(settings.host, settings.port)
            asyncio.run(serve(settings, with_parent=with_parent))
    except ValidationError as error:
        for complaint in complaints(error):
            say(complaint)
        return 2
    except ServeError as error:
        say(f"\n{error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
