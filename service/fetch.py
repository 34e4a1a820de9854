"""Media by URL, without letting a caller look into the server's network.

One parse serves for judging and for asking. The name is looked up once; if any of its addresses is not a
public one nothing is asked, else the connection goes to one of those very addresses, with the name in TLS and
in `Host`. Redirects are answers like any other that is not 200: refused. Bytes and seconds are counted.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import re
import socket
import ssl
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import httpcore

from service.errors import MediaTooLargeError, UrlNotAllowedError, UrlNotFetchedError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Sequence

    from service.settings import ServiceSettings

logger = logging.getLogger(__name__)

PORT = 443
MAX_URL = 2048
_LABEL = r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"
_URL = re.compile(
    rf"https://(?P<host>(?=[^/:?]{{1,253}}(?:[/:?]|$))(?:{_LABEL}\.)+[a-z](?:[a-z0-9-]{{0,61}}[a-z0-9])?)(?::443)?"
    r"(?P<target>[/?][A-Za-z0-9\-._~:/?@!$&'()*+,;=%\[\]]*)?",
    re.IGNORECASE | re.ASCII,  # else the long s and the Kelvin sign were letters too
)
"""Host: a DNS name whose last label begins with a letter, so no form of an address; no user, no other port,
no backslash, no fragment, nothing outside ASCII. What is not written in this plain way is not fetched."""
_GLOBAL_V6 = ipaddress.IPv6Network("2000::/3")
"""What IANA has given out as global unicast; the rest is local, translated or somebody's mistake."""
_TRANSLATED_V6 = (ipaddress.IPv6Network("2001::/23"), ipaddress.IPv6Network("2002::/16"))
"""Protocol assignments, Teredo among them, and 6to4: an IPv4 address is inside, which may be private."""


@dataclass(frozen=True, slots=True)
class Target:
    """What there is to ask for, and the only thing: parsed once."""

    host: str
    path: str

    @classmethod
    def parse(cls, url: str) -> Target | None:
        """None for every URL that is not plain https to a named host."""
        found = _URL.fullmatch(url) if len(url) <= MAX_URL else None
        if found is None:
            return None
        path = found["target"] or "/"
        return cls(found["host"].lower(), path if path.startswith("/") else f"/{path}")

    def allowed(self, domains: Iterable[str]) -> bool:
        """Whether one of `domains` is this host, or, beginning with `*.`, one that it lies below."""
        return any(
            self.host.endswith(domain[1:]) if domain.startswith("*.") else self.host == domain
            for domain in domains
        )


def is_public(address: str) -> bool:
    """Whether `address` is a host's on the public Internet, and no other's by translation."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address) and (
        ip not in _GLOBAL_V6 or any(ip in network for network in _TRANSLATED_V6)
    ):
        return False
    return ip.is_global and not ip.is_multicast


async def look_up(host: str) -> list[str]:
    """The addresses of `host`, as the system resolves it. Raises `OSError`."""
    found = await asyncio.get_running_loop().getaddrinfo(host, PORT, type=socket.SOCK_STREAM)
    return [str(sockaddr[0]) for *_, sockaddr in found]


class PinnedBackend(httpcore.AsyncNetworkBackend):
    """Connects to addresses that were judged, whatever name the pool asks for."""

    def __init__(self, addresses: Sequence[str], backend: httpcore.AsyncNetworkBackend) -> None:
        self._addresses = addresses
        self._backend = backend

    async def connect_tcp(
        self, host: str, port: int, *args: Any, **kwargs: Any
    ) -> httpcore.AsyncNetworkStream:
        """The first of the addresses that takes the connection; `host` is for TLS and the `Host` header."""
        for address in self._addresses[:-1]:
            try:
                return await self._backend.connect_tcp(address, port, *args, **kwargs)
            except httpcore.ConnectError:
                logger.info("an address of %s does not take connections, trying its next", host)
        return await self._backend.connect_tcp(self._addresses[-1], port, *args, **kwargs)


class Fetcher:
    """Fetches from the allowed domains. Everything that reaches outside is a parameter."""

    def __init__(
        self,
        settings: ServiceSettings,
        *,
        resolve: Callable[[str], Awaitable[Sequence[str]]] = look_up,
        backend: httpcore.AsyncNetworkBackend | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._domains = settings.allowed_media_domains
        self._resolve = resolve
        self._backend = backend or httpcore.AnyIOBackend()
        self._tls = tls or (ssl.create_default_context() if self._domains else None)

    async def stream(self, url: str, field: str, limit: int) -> AsyncGenerator[bytes, None]:
        """The bytes at `url`, in pieces, at most `limit` of them.

        Raises `UrlNotAllowedError`, `UrlNotFetchedError` or `MediaTooLargeError`. Time is the caller's to
        bound, for all of its URLs together: no count of idle seconds stops a slow drip.
        """
        target = self._judge(url, field)
        try:
            async for chunk in self._ask(target, field, limit):
                yield chunk
        except (httpcore.NetworkError, httpcore.ProtocolError, httpcore.TimeoutException, OSError) as error:
            raise _not_fetched(target, field, type(error).__name__) from None

    def _judge(self, url: str, field: str) -> Target:
        if not self._domains:
            raise UrlNotAllowedError(f"{field}: this server fetches no media; send a data URI or a file.")
        target = Target.parse(url)
        if target is None or not target.allowed(self._domains):
            raise UrlNotAllowedError(
                f"{field}: media are fetched from these domains alone, by plain https URLs: "
                f"{', '.join(self._domains)}."
            )
        return target

    async def _ask(self, target: Target, field: str, limit: int) -> AsyncIterator[bytes]:
        addresses = await self._resolve(target.host)
        if not addresses or not all(map(is_public, addresses)):
            raise _not_fetched(target, field, "no address, or one that is not public")
        url = httpcore.URL(scheme="https", host=target.host, port=PORT, target=target.path)
        headers = [("Host", target.host), ("Accept", "image/*, video/*"), ("Accept-Encoding", "identity")]
        backend = PinnedBackend(addresses, self._backend)
        async with (
            httpcore.AsyncConnectionPool(ssl_context=self._tls, network_backend=backend) as pool,
            pool.stream("GET", url, headers=headers) as response,
        ):
            if response.status != 200:  # also every redirect
                raise _not_fetched(target, field, f"status {response.status}")
            async for chunk in _counted(response, field, limit):
                yield chunk


async def _counted(response: httpcore.Response, field: str, limit: int) -> AsyncIterator[bytes]:
    """The body; what its header says of its size can only make it refused sooner."""
    too_large = MediaTooLargeError(f"{field}: what the URL gives is over {limit} bytes.")
    declared = {name.lower(): value for name, value in response.headers}.get(b"content-length", b"0")
    if declared.isdigit() and int(declared[:20]) > limit:
        raise too_large
    taken = 0
    async for chunk in response.aiter_stream():
        taken += len(chunk)
        if taken > limit:
            raise too_large
        yield chunk


def _not_fetched(target: Target, field: str, why: str) -> UrlNotFetchedError:
    """The same words whatever the reason is, which is for the operator's log."""
    logger.warning("media not fetched from %s: %s", target.host, why)
    return UrlNotFetchedError(f"{field}: the URL could not be fetched. Redirects are not followed.")
