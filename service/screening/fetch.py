"""Remote images: bytes from the hosts that a tenant's Policy names, and from nowhere else on any network.

Off unless the Policy says otherwise. A host's name is resolved once per connection; every address that it has must be
public, else nothing is opened at all, and the connection goes to an address that was checked: a name that changes its
mind later (DNS rebinding) changes nothing. The same holds for each redirect, whose host must be on the list too. Only
https on port 443, with the host's own certificate. No credentials, cookies, compression, proxies or connections that
outlive an image, and nothing is cached: what one tenant fetched is never another's.

What comes is as untrusted as any upload: the screening child judges it. A caller is told what to do, never where a name
led: all that failed below HTTP is one refusal.
"""

from __future__ import annotations

import asyncio
import socket
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING
from urllib.parse import urljoin

import httpcore2

from service.errors import DeadlineExceeded, ImageRejected
from service.screening import reject
from service.screening.locations import Location, is_public, read_location

if TYPE_CHECKING:
    import ssl
    from collections.abc import Iterable, Mapping

    from service.asks import Ask, Exchange, RawItem

HTTPS_PORT = 443
FETCH_S = 5.0
"""Seconds for one image, from its name to its last byte, redirects included."""
CONNECT_S = 2.0
"""Seconds for one address of several to answer."""
ADDRESSES_TRIED = 3
MOST_REDIRECTS = 2
REDIRECTS = frozenset({301, 302, 303, 307, 308})
AT_ONCE, AT_ONCE_IN_ALL = 4, 32
"""Images under way of one request, and of this gateway."""
RESOLVERS = 8
"""Names under way: the system's resolver takes a thread until it is done, however long that is."""
HEADERS = (
    (b"User-Agent", b"pericarp"),
    (b"Accept", b"image/jpeg, image/png, image/webp"),
    (b"Accept-Encoding", b"identity"),
    (b"Connection", b"close"),
)
UNREACHABLE = "The image could not be fetched in time. Check its URL, or send the image itself."


class Network:
    """The world outside: names to addresses, addresses to connections. Tests replace this and nothing else."""

    def __init__(self) -> None:
        self._resolvers = ThreadPoolExecutor(RESOLVERS, thread_name_prefix="resolve")
        self._backend = httpcore2.AnyIOBackend()

    async def resolve(self, host: str) -> list[str]:
        """All addresses of `host`, by the system's resolver. Raises OSError, UnicodeError."""

        def look_up() -> list[str]:
            found = socket.getaddrinfo(host, HTTPS_PORT, type=socket.SOCK_STREAM)
            return [str(address[4][0]) for address in found]

        return await asyncio.get_running_loop().run_in_executor(self._resolvers, look_up)

    async def connect(self, address: str) -> httpcore2.AsyncNetworkStream:
        """A TCP connection to that address, on port 443. Raises httpcore2.ConnectError, ConnectTimeout."""
        return await self._backend.connect_tcp(address, HTTPS_PORT, timeout=CONNECT_S)

    def close(self) -> None:
        """Take no more names. Those under way are not waited for."""
        self._resolvers.shutdown(wait=False, cancel_futures=True)


class Fetcher:
    """Fetches what an ask names by URL. One instance serves every request and keeps nothing between them."""

    def __init__(
        self,
        *,
        image_bytes: int,
        request_bytes: int,
        deadline_s: float,
        tls: ssl.SSLContext,
        network: Network,
        image_s: float = FETCH_S,
    ) -> None:
        """At most `image_bytes` an image and `request_bytes` a request; `deadline_s` is the whole request's."""
        self._image_bytes = image_bytes
        self._request_bytes = request_bytes
        self._deadline_s = deadline_s
        self._tls = tls
        self._network = network
        self._image_s = image_s
        self._room = asyncio.Semaphore(AT_ONCE_IN_ALL)

    async def __call__(self, exchange: Exchange, hosts: tuple[str, ...], ask: Ask) -> Ask:
        """The ask with bytes where it had URLs, fetched from `hosts` alone; each URL once.

        Raises `ImageRejected` with the field of an image that does not come, and `DeadlineExceeded`.
        """
        wanted = {item.url: item for item in reversed(ask.images) if item.url is not None}
        if not wanted:
            return ask
        errand = _Errand(frozenset(hosts), asyncio.Semaphore(AT_ONCE), self._request_bytes)
        left_s = max(0.0, self._deadline_s - exchange.elapsed_ms / 1000)
        with exchange.stage("fetch"):
            try:
                async with asyncio.timeout(left_s), asyncio.TaskGroup() as group:
                    tasks = {
                        url: group.create_task(self._fetch(url, item, errand)) for url, item in wanted.items()
                    }
            except TimeoutError:
                raise DeadlineExceeded from None
            except ExceptionGroup as failures:  # the others were cancelled: what failed first is the answer
                raise failures.exceptions[0] from None
        return _filled(ask, {url: task.result() for url, task in tasks.items()})

    async def _fetch(self, url: str, item: RawItem, errand: _Errand) -> bytes:
        """One image, its redirects included. Raises `ImageRejected` with its field."""
        try:
            async with errand.room, self._room, asyncio.timeout(self._image_s):
                for _ in range(1 + MOST_REDIRECTS):
                    got = await self._get(errand.check(url), errand)
                    if isinstance(got, bytes):
                        return got
                    url = got.url
            raise reject(
                "unreachable", f"The image's URL leads through more than {MOST_REDIRECTS} redirects."
            )
        except (httpcore2.NetworkError, httpcore2.TimeoutException, httpcore2.ProtocolError, OSError) as exc:
            failure = reject("unreachable", UNREACHABLE)  # OSError: TimeoutError and ssl.SSLError as well
            failure.field = item.image_where
            raise failure from exc
        except ImageRejected as exc:
            exc.field = item.image_where
            raise

    async def _get(self, location: Location, errand: _Errand) -> bytes | _Redirect:
        """The body at `location`, or where it leads. A connection of its own, which ends with it."""
        url = httpcore2.URL(
            scheme=b"https", host=location.host.encode(), port=HTTPS_PORT, target=location.target.encode()
        )
        async with (
            httpcore2.AsyncConnectionPool(
                ssl_context=self._tls, max_connections=1, network_backend=_PublicOnly(self._network)
            ) as pool,
            pool.stream("GET", url, headers=[(b"Host", location.host.encode()), *HEADERS]) as response,
        ):
            if response.status in REDIRECTS:
                return _Redirect(urljoin(location.url, _header(response, b"location")))
            if response.status != 200:
                raise reject("unreachable", f"The image's host answered {response.status:d}. Check its URL.")
            if _header(response, b"content-encoding").lower() not in ("", "identity"):
                raise reject("unreachable", "The image's host sent it compressed. Send the image itself.")
            length = _header(response, b"content-length")
            if length.isascii() and length.isdigit():
                self._check(int(length))
            body = bytearray()
            async for chunk in response.aiter_stream():
                body += chunk
                self._check(len(body))
                errand.spend(len(chunk))
            return bytes(body)

    def _check(self, size_bytes: int) -> None:
        if size_bytes > self._image_bytes:
            raise reject(
                "too_many_bytes",
                f"The image has more than {self._image_bytes:,} bytes. Compress it or scale it down.",
                self._image_bytes,
            )


@dataclass(frozen=True, slots=True)
class _Redirect:
    url: str


@dataclass(slots=True)
class _Errand:
    """What the images of one request share: whence, how many at a time, and how many bytes in all."""

    hosts: frozenset[str]
    room: asyncio.Semaphore
    left_bytes: int

    def check(self, url: str) -> Location:
        """Where to fetch. Raises `ImageRejected` for what may not be fetched: of a request's own URL a second lock."""
        location = read_location(url)
        if location is None or location.host not in self.hosts:
            raise reject(
                "unreachable", "The image's URL leads to a place that the tenant's policy does not name."
            )
        return location

    def spend(self, size_bytes: int) -> None:
        """Raises `ImageRejected` where the request's images together are more than a body might have held."""
        self.left_bytes -= size_bytes
        if self.left_bytes < 0:
            raise reject("too_many_bytes", "The request's images are too large together. Send fewer.")


class _PublicOnly(httpcore2.AsyncNetworkBackend):
    """Connects to names whose addresses are all public, by one of the addresses that were checked."""

    def __init__(self, network: Network) -> None:
        self._network = network

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109 - the library's signature; time is limited around it
        local_address: str | None = None,
        socket_options: Iterable[httpcore2.SOCKET_OPTION] | None = None,
    ) -> httpcore2.AsyncNetworkStream:
        try:
            addresses = list(dict.fromkeys(await self._network.resolve(host)))
        except (OSError, UnicodeError) as exc:
            raise httpcore2.ConnectError("the name has no address") from exc
        if port != HTTPS_PORT or not addresses or not all(map(is_public, addresses)):
            raise httpcore2.ConnectError("not a public address")
        failure: Exception = httpcore2.ConnectError("no address answers")
        for address in addresses[:ADDRESSES_TRIED]:
            try:
                return await self._network.connect(address)
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout) as exc:
                failure = exc
        raise failure


def _header(response: httpcore2.Response, name: bytes) -> str:
    """The first header of that name, empty where there is none."""
    return next((value.decode("latin-1") for key, value in response.headers if key.lower() == name), "")


def _filled(ask: Ask, images: Mapping[str, bytes]) -> Ask:
    def fill(item: RawItem) -> RawItem:
        return item if item.url is None else replace(item, image=images[item.url], url=None)

    queries = tuple(map(fill, ask.queries))
    return replace(
        ask,
        query=queries[0] if queries else fill(ask.query),
        documents=tuple(map(fill, ask.documents)),
        queries=queries,
    )
