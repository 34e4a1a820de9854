"""A broker reached by TLS is who it says it is, for either side and each of its two clients."""

from __future__ import annotations

import socket
import ssl
import threading
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import pytest
import trustme
from kombu.exceptions import OperationalError
from redis.exceptions import ConnectionError as RedisConnectionError

from service.jobs import producer
from worker.app import create_app
from worker.jobs import connect
from worker.settings import WorkerSettings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

PASSWORD = "s3cret"


def front_end_sends(url: str) -> None:
    producer(url, timeout_s=5).send_task("anything", retry=False)


def worker_takes(url: str) -> None:
    app = create_app(WorkerSettings(broker_url=url, media_url="memory://"), lambda _id, _payload: None)
    with app.connection_for_read() as connection:
        connection.ensure_connection(max_retries=1, interval_start=0, timeout=5)


def worker_tells(url: str) -> None:
    connect(url, patient=False).ping()


@contextmanager
def pretending(authority: trustme.CA) -> Iterator[tuple[int, list[bytes]]]:
    """The port of a server with a certificate of `authority`, and what its clients tell it first."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    told: list[bytes] = []

    def serve() -> None:
        while True:
            try:
                plain, _ = listener.accept()
            except OSError:
                return
            plain.settimeout(5)
            with plain, suppress(OSError), context.wrap_socket(plain, server_side=True) as connection:
                told.append(connection.recv(4096))

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield listener.getsockname()[1], told
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


@pytest.mark.parametrize("use", [front_end_sends, worker_takes, worker_tells])
def test_a_broker_with_a_strangers_certificate_is_told_nothing(use: Callable[[str], None]) -> None:
    raises = pytest.raises((OperationalError, RedisConnectionError), match="CERTIFICATE_VERIFY_FAILED")
    with pretending(trustme.CA()) as (port, told), raises:
        use(f"rediss://:{PASSWORD}@127.0.0.1:{port}/0")
    assert told == []


@pytest.mark.parametrize("use", [front_end_sends, worker_takes, worker_tells])
def test_an_authority_of_ones_own_is_named_in_the_url(use: Callable[[str], None], tmp_path: Path) -> None:
    authority, file = trustme.CA(), tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(file)
    raises = pytest.raises((OperationalError, RedisConnectionError))  # it hangs up after the first words
    with pretending(authority) as (port, told), raises:
        use(f"rediss://:{PASSWORD}@127.0.0.1:{port}/0?ssl_ca_certs={file}")
    assert PASSWORD.encode() in told[0]
