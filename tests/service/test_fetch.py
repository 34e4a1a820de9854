"""Media by URL: nothing but the public address of an allowed name is ever connected to."""

from __future__ import annotations

import asyncio
import base64
import ssl
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import httpcore
import pytest
import trustme
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from service.errors import MediaTooLargeError, ServiceError, UrlNotAllowedError, UrlNotFetchedError
from service.fetch import Fetcher, Target, is_public
from service.keys import Caller
from service.media import MediaStore, open_store
from service.schemas import AnswerRequest
from service.settings import ServiceSettings
from tests.present import present
from tests.service.conftest import StandInWorker, png, problem, question, serving

if TYPE_CHECKING:
    import ipaddress
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
    from contextlib import AbstractAsyncContextManager

    from tests.service.conftest import MakeSettings

    Answer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
    MakeStore = Callable[..., AbstractAsyncContextManager[MediaStore]]

PUBLIC = "93.184.215.14"
HOST = "media.example.org"
URL = f"https://{HOST}/scene.png"
SETTINGS = ServiceSettings(
    media_url="memory:///",
    allowed_media_domains="media.example.org,*.cdn.example.org,127.0.0.1.nip.example.org",
    fetch_timeout_s=5,
)

HOSTILE_URLS = [
    # other schemes
    "http://media.example.org/a.png",
    "ftp://media.example.org/a.png",
    "file:///etc/passwd",
    "file://media.example.org/etc/passwd",
    "gopher://media.example.org/",
    "data:image/png;base64,AAAA",
    "//media.example.org/a.png",
    "media.example.org/a.png",
    "https:/media.example.org/a.png",
    "https:media.example.org/a.png",
    "https:///media.example.org/a.png",
    "jar:https://media.example.org/a.png",
    "",
    # addresses in all their forms
    "https://127.0.0.1/a.png",
    "https://127.1/a.png",
    "https://2130706433/a.png",
    "https://0x7f000001/a.png",
    "https://0x7f.0.0.1/a.png",
    "https://0177.0.0.1/a.png",
    "https://017700000001/a.png",
    "https://0/a.png",
    "https://10.0.0.1/a.png",
    "https://169.254.169.254/latest/meta-data/",
    "https://[::1]/a.png",
    "https://[::]/a.png",
    "https://[::ffff:127.0.0.1]/a.png",
    "https://[::ffff:7f00:1]/a.png",
    "https://[0:0:0:0:0:ffff:127.0.0.1]/a.png",
    "https://[fe80::1%25eth0]/a.png",
    "https://[64:ff9b::7f00:1]/a.png",
    "https://1.1.1.1/a.png",
    "https://①②⑦.⓪.⓪.①/a.png",
    "https://127。0。0。1/a.png",
    # names that are not allowed
    "https://localhost/a.png",
    "https://localhost.localdomain/a.png",
    "https://metadata.google.internal/computeMetadata/v1/",
    "https://example.org/a.png",
    "https://other.example.org/a.png",
    "https://cdn.example.org/a.png",
    "https://evil-media.example.org/a.png",
    "https://evilcdn.example.org/a.png",
    "https://media.example.org.evil.example/a.png",
    "https://media.example.org./a.png",
    "https://.media.example.org/a.png",
    "https://media..example.org/a.png",
    "https://-a.cdn.example.org/a.png",
    f"https://{'a' * 64}.cdn.example.org/a.png",
    f"https://{'a.' * 130}cdn.example.org/a.png",
    "https://xn--a.example/a.png",
    "https://medi\u0430.example.org/a.png",  # a Cyrillic a
    "https://media.example.or\u0261/a.png",  # a phonetic g
    "https://\u017f.cdn.example.org/a.png",  # the long s, which folds to s
    "https://\u212a.cdn.example.org/a.png",  # the Kelvin sign, which folds to k
    # user information, ports, backslashes, fragments, white space, controls
    "https://media.example.org@127.0.0.1/a.png",
    "https://127.0.0.1@media.example.org/a.png",
    "https://user:pass@media.example.org/a.png",
    "https://media.example.org:443@127.0.0.1/a.png",
    "https://127.0.0.1:6666\\@media.example.org/a.png",
    "https://media.example.org\\@127.0.0.1/a.png",
    "https://media.example.org\\.evil.example/a.png",
    "https:\\\\media.example.org\\a.png",
    "https://media.example.org#@127.0.0.1/a.png",
    "https://media.example.org/a.png#fragment",
    "https://127.0.0.1#.cdn.example.org/a.png",
    "https://127.0.0.1?.cdn.example.org/a.png",
    "https://127.0.0.1/.cdn.example.org/a.png",
    "https://127.0.0.1%2f.cdn.example.org/a.png",
    "https://media.example.org%00.evil.example/a.png",
    "https://media%2eexample%2eorg/a.png",
    "https://media.example.org:80/a.png",
    "https://media.example.org:8443/a.png",
    "https://media.example.org:0443/a.png",
    "https://media.example.org:/a.png",
    "https://media.example.org:443443/a.png",
    " https://media.example.org/a.png",
    "https://media.example.org/a.png ",
    "https://media.example.org/a.png\n",
    "https://media.example.org/a.png\r\nHost: 127.0.0.1",
    "https://media.example.org\t/a.png",
    "https://media.exa\tmple.org/a.png",
    "https://media.example.org /a.png",
    "https://media.example.org/a\x00.png",
    "https://media.example.org/ä.png",
    f"https://media.example.org/{'a' * 3000}",
]
ADDRESSES_NOT_PUBLIC = [
    "127.0.0.1",
    "127.8.8.8",
    "0.0.0.0",
    "10.1.2.3",
    "172.16.0.1",
    "192.168.1.1",
    "169.254.169.254",
    "100.64.0.1",
    "192.0.0.1",
    "192.0.2.1",
    "198.18.0.1",
    "198.51.100.1",
    "203.0.113.1",
    "224.0.0.1",
    "239.255.255.250",
    "240.0.0.1",
    "255.255.255.255",
    "::",
    "::1",
    "::127.0.0.1",
    "::ffff:127.0.0.1",
    "::ffff:1.1.1.1",
    "64:ff9b::7f00:1",
    "64:ff9b:1::1",
    "100::1",
    "2001::1",
    "2001:db8::1",
    "2002:7f00:1::",
    "fc00::1",
    "fd00:ec2::254",
    "fe80::1",
    "fe80::1%eth0",
    "fec0::1",
    "ff02::1",
    "not an address",
    "",
]


class Dialer(httpcore.AsyncNetworkBackend):
    """Notes every address that it is asked to connect to, and connects to the test's server instead."""

    def __init__(self, port: int | None) -> None:
        self._port = port
        self._real = httpcore.AnyIOBackend()
        self.dialed: list[tuple[str, int]] = []

    async def connect_tcp(
        self, host: str, port: int, *args: Any, **kwargs: Any
    ) -> httpcore.AsyncNetworkStream:
        self.dialed.append((host, port))
        if self._port is None:
            raise httpcore.ConnectError("nobody is there")
        return await self._real.connect_tcp("127.0.0.1", self._port, *args, **kwargs)


@pytest.fixture(scope="session")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="session")
def trusting(authority: trustme.CA) -> ssl.SSLContext:
    """A client's TLS that believes the test's authority and nobody else."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    authority.configure_trust(context)
    return context


@asynccontextmanager
async def site(authority: trustme.CA, answer: Answer, name: str = HOST) -> AsyncIterator[int]:
    """A TLS server with a certificate for `name`; yields its port."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(name).configure_cert(context)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await answer(reader, writer)
            await writer.drain()
        except ConnectionError:
            pass  # the fetcher had enough
        finally:
            writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context) as server:
        yield server.sockets[0].getsockname()[1]


def fixed(*addresses: str) -> Callable[[str], Awaitable[Sequence[str]]]:
    """A resolver that gives every name these addresses."""

    async def resolve(_host: str) -> Sequence[str]:
        return addresses

    return resolve


def saying(head: str, body: bytes = b"") -> Answer:
    """A server that sends this, whatever is asked."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(f"HTTP/1.1 {head}\r\n\r\n".encode() + body)

    return answer


async def fetched(fetcher: Fetcher, url: str = URL, limit: int = 100_000) -> bytes:
    return b"".join([chunk async for chunk in fetcher.stream(url, "image", limit)])


def distrusting(**parts: Any) -> Fetcher:
    """A fetcher whose TLS believes nobody: none of its connections gets further than the first words."""
    return Fetcher(SETTINGS, tls=ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), **parts)


async def never(_host: str) -> Sequence[str]:
    raise AssertionError("a name was looked up")


def test_there_are_enough_hostile_urls() -> None:
    """At least 60, each once."""
    assert len(set(HOSTILE_URLS)) == len(HOSTILE_URLS) >= 60


@pytest.mark.parametrize("url", HOSTILE_URLS)
async def test_a_hostile_url_is_refused_before_any_name_is_looked_up(url: str) -> None:
    """Whatever its form, nothing is resolved and nothing connected to."""
    dialer = Dialer(None)
    with pytest.raises(UrlNotAllowedError):
        await fetched(distrusting(resolve=never, backend=dialer), url)
    assert dialer.dialed == []


async def test_no_hostile_url_reaches_a_listener_on_loopback() -> None:
    """With the real resolver, and a network in which every connection ends at the listener."""
    knocked = 0

    async def listen(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal knocked
        knocked += 1
        writer.close()

    async with await asyncio.start_server(listen, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        to_listener = Dialer(port)  # whoever is let through to an address knocks at the listener
        for url in HOSTILE_URLS:
            with pytest.raises(ServiceError):
                await fetched(distrusting(backend=to_listener), url)
            with pytest.raises(ServiceError):
                await fetched(distrusting(backend=to_listener), url.replace("443", str(port)))
        for address in ADDRESSES_NOT_PUBLIC:
            with pytest.raises(UrlNotFetchedError):
                await fetched(distrusting(backend=to_listener, resolve=fixed(address)))
        assert knocked == 0
        with pytest.raises(UrlNotFetchedError):  # the listener does hear those who come
            await fetched(distrusting(backend=to_listener, resolve=fixed(PUBLIC)))
        assert knocked == 1


@given(st.text(max_size=60))
def test_any_text_after_an_allowed_origin_stays_on_that_host(text: str) -> None:
    """Nothing that is appended changes the host, unless it makes the URL a refused one."""
    for start in (f"https://{HOST}", f"https://{HOST}/"):
        target = Target.parse(start + text)
        if target is not None and target.allowed(SETTINGS.allowed_media_domains):
            assert target.host == HOST
            assert target.path.startswith("/")
            assert target.path.isascii()
            assert not set(target.path) & set(" \\#\r\n\0")


@given(st.ip_addresses())
def test_what_is_public_is_global_and_no_multicast(
    address: ipaddress.IPv4Address | ipaddress.IPv6Address,
) -> None:
    """The standard library's word is necessary, and not enough."""
    if is_public(str(address)):
        assert address.is_global
        assert not address.is_multicast
        assert not address.is_private
        assert getattr(address, "ipv4_mapped", None) is None
        assert getattr(address, "sixtofour", None) is None
        assert getattr(address, "teredo", None) is None


@pytest.mark.parametrize("address", [PUBLIC, "1.1.1.1", "2606:4700:4700::1111", "2a00:1450:4001:81b::200e"])
def test_public_addresses_are_public(address: str) -> None:
    """The guard is not simply shut."""
    assert is_public(address)


@pytest.mark.parametrize("address", ADDRESSES_NOT_PUBLIC)
@pytest.mark.parametrize("beside", [(), (PUBLIC,)])
async def test_a_name_with_one_bad_address_is_not_connected_to(address: str, beside: tuple[str, ...]) -> None:
    """Alone or mixed with good ones, first or last: one is enough."""
    for answers in ((address, *beside), (*beside, address)):
        dialer = Dialer(None)
        with pytest.raises(UrlNotFetchedError):
            await fetched(distrusting(resolve=fixed(*answers), backend=dialer))
        assert dialer.dialed == []


async def test_a_name_is_looked_up_once_and_its_answer_is_what_is_connected_to(
    authority: trustme.CA, trusting: ssl.SSLContext
) -> None:
    """A resolver that rebinds the name after it was judged is not asked again."""
    looked_up = 0

    async def rebinding(_host: str) -> Sequence[str]:
        nonlocal looked_up
        looked_up += 1
        return [PUBLIC if looked_up == 1 else "127.0.0.1"]

    async with site(authority, saying("200 OK\r\nContent-Length: 2", b"ok")) as port:
        dialer = Dialer(port)
        fetcher = Fetcher(SETTINGS, resolve=rebinding, backend=dialer, tls=trusting)
        assert await fetched(fetcher) == b"ok"
        assert dialer.dialed == [(PUBLIC, 443)]
        with pytest.raises(UrlNotFetchedError):
            await fetched(fetcher)
    assert dialer.dialed == [(PUBLIC, 443)]


async def test_the_server_is_asked_by_its_name(authority: trustme.CA, trusting: ssl.SSLContext) -> None:
    """`Host` and TLS carry the name though the connection goes to an address; nothing is to be compressed."""
    heard = b""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal heard
        heard = await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")

    async with site(authority, answer, name="a.cdn.example.org") as port:
        fetcher = Fetcher(SETTINGS, resolve=fixed(PUBLIC), backend=Dialer(port), tls=trusting)
        assert await fetched(fetcher, "https://A.cdn.example.org:443/x?y=%2F") == b"ok"
    assert heard.startswith(b"GET /x?y=%2F HTTP/1.1\r\n")
    assert b"\r\nHost: a.cdn.example.org\r\n" in heard
    assert b"\r\nAccept-Encoding: identity\r\n" in heard


async def test_the_next_address_is_tried_where_one_takes_no_connection(
    authority: trustme.CA, trusting: ssl.SSLContext
) -> None:
    """All of them were judged before the first was tried."""

    class FirstIsDown(Dialer):
        async def connect_tcp(
            self, host: str, port: int, *args: Any, **kwargs: Any
        ) -> httpcore.AsyncNetworkStream:
            if host == "1.1.1.1":
                raise httpcore.ConnectError("down")
            return await super().connect_tcp(host, port, *args, **kwargs)

    async with site(authority, saying("200 OK\r\nContent-Length: 2", b"ok")) as port:
        dialer = FirstIsDown(port)
        resolve = fixed("1.1.1.1", PUBLIC)
        assert await fetched(Fetcher(SETTINGS, resolve=resolve, backend=dialer, tls=trusting)) == b"ok"
    assert dialer.dialed == [(PUBLIC, 443)]


@pytest.mark.parametrize("name", ["other.example.org", "127.0.0.1"])
async def test_a_certificate_for_another_name_is_refused(
    authority: trustme.CA, trusting: ssl.SSLContext, name: str
) -> None:
    """Whoever took over the address still is not the host."""
    async with site(authority, saying("200 OK\r\nContent-Length: 2", b"ok"), name) as port:
        fetcher = Fetcher(SETTINGS, resolve=fixed(PUBLIC), backend=Dialer(port), tls=trusting)
        with pytest.raises(UrlNotFetchedError):
            await fetched(fetcher)


@pytest.mark.parametrize("status", ["301 Moved", "302 Found", "303 See", "307 Again", "308 For ever"])
@pytest.mark.parametrize("location", ["https://127.0.0.1/", "http://169.254.169.254/", URL, "//10.0.0.1/"])
async def test_no_redirect_is_followed(
    authority: trustme.CA, trusting: ssl.SSLContext, status: str, location: str
) -> None:
    """Not even to the host itself: chains begin somewhere."""
    async with site(authority, saying(f"{status}\r\nLocation: {location}\r\nContent-Length: 0")) as port:
        dialer = Dialer(port)
        with pytest.raises(UrlNotFetchedError):
            await fetched(Fetcher(SETTINGS, resolve=fixed(PUBLIC), backend=dialer, tls=trusting))
    assert dialer.dialed == [(PUBLIC, 443)]


@pytest.mark.parametrize(
    ("head", "body", "error"),
    [
        ("404 Not Found\r\nContent-Length: 0", b"", UrlNotFetchedError),
        ("500 Oh\r\nContent-Length: 0", b"", UrlNotFetchedError),
        ("206 Partial\r\nContent-Length: 2", b"ok", UrlNotFetchedError),
        ("200 OK\r\nContent-Length: 100001", b"", MediaTooLargeError),
        (f"200 OK\r\nContent-Length: {'9' * 20}", b"", MediaTooLargeError),
        ("200 OK\r\nContent-Length: 50", b"short", UrlNotFetchedError),
        ("200 OK\r\nContent-Length: minus", b"", UrlNotFetchedError),
        ("200 OK", bytes(100_001), MediaTooLargeError),
        (
            "200 OK\r\nTransfer-Encoding: chunked",
            b"19000\r\n" + bytes(0x19000) + b"\r\n0\r\n\r\n",
            MediaTooLargeError,
        ),
        ("200 OK\r\nTransfer-Encoding: chunked", b"zz\r\n", UrlNotFetchedError),
        ("no status at all", b"", UrlNotFetchedError),
    ],
)
async def test_a_dishonest_server_is_refused(
    authority: trustme.CA, trusting: ssl.SSLContext, head: str, body: bytes, error: type[ServiceError]
) -> None:
    """Too much, declared or not; too little; nonsense. What it says never reaches the caller."""
    async with site(authority, saying(head, body)) as port:
        fetcher = Fetcher(SETTINGS, resolve=fixed(PUBLIC), backend=Dialer(port), tls=trusting)
        with pytest.raises(error) as raised:
            await fetched(fetcher)
    assert "status" not in str(raised.value)


async def test_a_server_that_sends_more_than_it_said_gives_no_more_than_that(
    authority: trustme.CA, trusting: ssl.SSLContext
) -> None:
    """A length that lies low is a length: the rest is not read."""
    async with site(authority, saying("200 OK\r\nContent-Length: 2", b"ok" + bytes(10_000))) as port:
        fetcher = Fetcher(SETTINGS, resolve=fixed(PUBLIC), backend=Dialer(port), tls=trusting)
        assert await fetched(fetcher) == b"ok"


@pytest.fixture
def store(authority: trustme.CA, trusting: ssl.SSLContext, broker_url: str) -> MakeStore:
    """Makes media stores whose URLs are all answered by one server, within a time."""
    from redis.asyncio import Redis

    from service.shelf import Shelf

    @asynccontextmanager
    async def make(answer: Answer, timeout_s: float = 5) -> AsyncIterator[MediaStore]:
        settings = SETTINGS.model_copy(update={"fetch_timeout_s": timeout_s, "broker_url": broker_url})
        async with (
            site(authority, answer) as port,
            Redis.from_url(broker_url, decode_responses=True) as redis,
        ):
            fetcher = Fetcher(settings, resolve=fixed(PUBLIC), backend=Dialer(port), tls=trusting)
            yield MediaStore(open_store("memory:///"), Shelf(redis, settings), fetcher, settings)

    return make


def asked(**media: Any) -> AnswerRequest:
    return AnswerRequest(question="What?", **media)


async def test_media_by_url_are_judged_like_any_others(store: MakeStore) -> None:
    """Fetched, told apart by their bytes, measured, stored under their hash."""
    head = f"200 OK\r\nContent-Type: text/html\r\nContent-Length: {len(png())}"
    async with (
        store(saying(head, png())) as media,
        media.intake(asked(images=({"url": URL},) * 2), Caller("")) as intakes,
    ):
        await media.keep(intakes, Caller(""))
        assert [intake.ref.media_type for intake in intakes] == ["image/png"] * 2
        files = [present(intake.file) for intake in intakes]
        async with media.intake(asked(image={"id": intakes[0].ref.id}), Caller("")) as by_id:
            assert by_id[0].ref == intakes[0].ref
    assert all(file.closed for file in files)


async def test_a_slow_drip_ends_at_the_deadline(store: MakeStore) -> None:
    """A byte now and then keeps no fetch alive: all URLs of a request share one deadline."""

    async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            writer.write(b"\x89")
            await writer.drain()
            await asyncio.sleep(0.01)

    async with store(drip, 0.3) as media:
        with pytest.raises(UrlNotFetchedError, match="in time"):
            async with media.intake(asked(images=({"url": URL},) * 8), Caller("")):
                pass


async def test_by_default_nothing_is_fetched(make_settings: MakeSettings, worker: StandInWorker) -> None:
    """Media by URL are off until an operator names domains; then others are refused with their names."""
    sent = question(image={"url": "https://elsewhere.example/a.png"})
    async with serving(make_settings()) as client:
        assert "fetches no media" in problem(
            await client.post("/v1/answer", json=sent), 422, "url-not-allowed"
        )
    async with serving(make_settings(allowed_media_domains="*.Example.org")) as client:
        assert "*.example.org" in problem(await client.post("/v1/answer", json=sent), 422, "url-not-allowed")


@pytest.mark.parametrize(
    "domain", ["*", "*.", "https://example.org", "example.org/", "10.0.0.1", "a b.org", "localhost"]
)
def test_domains_are_domains(domain: str) -> None:
    """A pattern that would allow everything, or nothing, is a bad setting."""
    with pytest.raises(ValidationError):
        ServiceSettings(media_url="memory:///", allowed_media_domains=domain)


def test_data_in_a_url_field_is_not_decoded() -> None:
    """A data URI is a data URI in its own place only."""
    assert Target.parse(f"data:image/png;base64,{base64.b64encode(png()).decode()}") is None
