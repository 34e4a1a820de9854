"""A server that stops loses no request that is on its way: one sent to it before its callers could know."""

from __future__ import annotations

import asyncio
import ctypes
import os
import socket
import struct
import sys
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    import uvicorn
    from uvicorn.server import ServerState

LAST_REQUESTS_S = 0.5
"""Several times the way of a request: connections that are silent for so long carry none."""

_SO_ATTACH_FILTER = 26  # of Linux, on most architectures; `socket` has no name for it before Python 3.14
_FLAGS, _SYN = 13, 0x02  # of a TCP header
_NO_SYN = (
    (0x30, 0, 0, _FLAGS),  # load the byte
    (0x45, 0, 1, _SYN),  # where it has the bit: the next instruction, else the one behind it
    (0x06, 0, 0, 0),  # keep nothing of the packet
    (0x06, 0, 0, 0xFFFFFFFF),  # keep all of it
)


async def last_requests(server: uvicorn.Server) -> None:
    """Answers what is on its way, over connections that end behind each answer, while no new ones begin.

    uvicorn's own shutdown closes the listener over connections that nobody has accepted yet, and those over
    which it has not read a request yet; their callers have sent one, and are cut off.
    """
    refuse_connections(listening for each in server.servers for listening in each.sockets)
    close_behind_answers(server.server_state)
    await asyncio.sleep(LAST_REQUESTS_S)


def close_behind_answers(state: ServerState) -> None:
    """Every answer from now on is the last one over its connection, and says so."""
    state.default_headers = [*state.default_headers, (b"connection", b"close")]
    for connection in state.connections:
        cycle = getattr(connection, "cycle", None)
        if cycle is not None:
            cycle.keep_alive = False  # one that began before


def refuse_connections(listeners: Iterable[socket.socket]) -> None:
    """New connections get no reply, while those that have begun come about and wait to be accepted.

    Whoever asks for one asks again after a second, when the listener is closed, and is refused. To close it
    right away would reset all that have not been accepted. Where a system has no such filter, nothing is
    done: there some may be lost.
    """
    if sys.platform != "linux":
        return
    program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *each) for each in _NO_SYN))
    described = struct.pack("HP", len(_NO_SYN), ctypes.addressof(program))
    for listener in listeners:
        with suppress(OSError), socket.socket(fileno=os.dup(listener.fileno())) as listening:
            listening.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, described)
