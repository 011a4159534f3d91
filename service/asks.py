"""What was asked, free of HTTP: an `Ask` is a checked request whose images are still untrusted bytes.

An `Exchange` is the life of one HTTP request: who asks, since when, what each stage took, and whether the log
has its entry already. The door makes it, the hot path fills it, the answer is built from it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from service.errors import ClientClosed, Contained, Overloaded

if TYPE_CHECKING:
    from service.screened import Screened
    from tenants.access import Caller
    from tenants.audit import Entry
    from tenants.limits import Standing


@dataclass(frozen=True, slots=True)
class RawItem:
    """One side of a pair as it was sent: text, an image, or both. `where` names it to the caller.

    An image is encoded bytes, or a `url` until they were fetched.
    """

    where: str
    text: str | None = None
    image: bytes | None = None
    sent_image: str | None = None
    """The image as it was sent, to be repeated where `return_documents` asks for it."""
    image_where: str | None = None
    """Names the image to the caller, where there is one."""
    sent: object = None
    """The side as it was sent, to be repeated, where `text` and `sent_image` do not say it all."""
    url: str | None = None
    """Where the image is to be fetched; the tenant's Policy allows it."""

    @property
    def pictured(self) -> bool:
        """Whether it has an image, fetched or not."""
        return self.image is not None or self.url is not None


@dataclass(frozen=True, slots=True)
class Ask:
    """A checked request: a query and its documents or, to be scored pair by pair, a query for each document."""

    query: RawItem
    documents: tuple[RawItem, ...]
    instruction: str | None
    top_n: int
    return_documents: bool
    max_tokens_per_doc: int | None
    truncate: bool

    session: str | None = None
    """The id of the session it names, as it was sent."""
    queries: tuple[RawItem, ...] = ()
    """One for each document, `query` being the first of them; empty where `query` is for all."""
    ranked: bool = True
    """Whether the answer is in order of relevance; else in the request's."""

    @property
    def items(self) -> tuple[RawItem, ...]:
        """The query, or all of them, then every document."""
        return (*(self.queries or (self.query,)), *self.documents)

    @property
    def images(self) -> tuple[RawItem, ...]:
        return tuple(item for item in self.items if item.pictured)


@dataclass(slots=True)
class Exchange:
    """One HTTP request from its first header to its last byte."""

    request_id: str
    client_address: str
    operation: str
    keyless: bool = False
    """Whether it came without any credential."""
    trace_id: str = ""
    """Of the trace that it belongs to, 32 hexadecimal digits (W3C Trace Context): the caller's, or a new one."""
    end_user: str = ""
    """For whom a search backend asks, where it says so; a name of its own making."""
    named_model: str | None = None
    """The model that the request names, where it was read; of a caller's making, and as long as it likes."""
    caller: Caller | None = None
    started_s: float = field(default_factory=time.monotonic)
    stages_ms: dict[str, float] = field(default_factory=dict)
    standings: tuple[Standing, ...] = ()
    """Where the caller's limits stand, once they were asked."""
    screened: Screened | None = None
    """What was decided about its texts and images, once they were screened."""
    entry_id: str | None = None
    """The id of this request's entry in the log, once there is one."""
    entry: Entry | None = None
    """What the log was told of it last."""
    query: str | None = None
    """The text that was asked, once its decision was written."""
    user_agent: str = ""
    halted: bool = False
    """Set by `halt`: nothing more is done for this request."""
    connection: asyncio.Timeout | None = None
    """While what `while_connected` guards is under way."""
    hung_up: Callable[[], Awaitable[None]] | None = None
    """Returns once the caller has closed the connection. Unset until the body was read: before, it would eat it."""

    @property
    def known_caller(self) -> Caller:
        """Who asks. Only behind the door, which lets nobody in without a caller."""
        assert self.caller is not None, "the door lets nobody in without a caller"
        return self.caller

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure one stage, in milliseconds, also when it raises."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.stages_ms[name] = self.stages_ms.get(name, 0.0) + (time.perf_counter() - start) * 1000

    @asynccontextmanager
    async def while_connected(self) -> AsyncIterator[None]:
        """Break off what is inside when the caller hangs up, and raise `ClientClosed`; or `Contained` when halted."""
        if self.halted:
            raise Contained(reason="contained")
        try:
            async with asyncio.timeout(None) as connection:
                self.connection = connection
                watching = asyncio.create_task(self._watch(connection))
                try:
                    yield
                finally:
                    self.connection = None
                    watching.cancel()
        except TimeoutError:
            if connection.expired():
                raise (Contained(reason="contained") if self.halted else ClientClosed()) from None
            raise

    def halt(self) -> None:
        """Break off the request, for its key or tenant is contained: there will be no answer but a refusal."""
        self.halted = True
        if self.connection is not None and not self.connection.expired():
            self.connection.reschedule(0)  # now

    async def _watch(self, connection: asyncio.Timeout) -> None:
        if self.hung_up is not None:
            await self.hung_up()
            if not connection.expired():
                connection.reschedule(0)  # now

    @property
    def elapsed_ms(self) -> float:
        return (time.monotonic() - self.started_s) * 1000


class Running:
    """The requests of known callers that are under way at this gateway. Belongs to one event loop.

    No tenant may have more of them, nor more bytes of bodies in this gateway's memory, than is its share.
    """

    def __init__(self, *, most_requests: int, most_body_bytes: int) -> None:
        """Of one tenant, at a time."""
        self._most_requests = most_requests
        self._most_body_bytes = most_body_bytes
        self._exchanges: dict[str, Exchange] = {}
        self._shares: dict[str, Share] = {}

    @contextmanager
    def under_way(self, exchange: Exchange) -> Iterator[Callable[[int], None]]:
        """Count the request in while the block lasts; the function counts bytes of its body in.

        Both raise `Overloaded` where the tenant has its share already.
        """
        tenant = str(exchange.known_caller.tenant)
        share = self._shares.setdefault(tenant, Share())
        if share.requests >= self._most_requests:
            raise Overloaded("Too many requests of this tenant are under way.", reason="tenant_requests")
        received = 0

        def receive(size_bytes: int) -> None:
            nonlocal received
            if share.body_bytes + size_bytes > self._most_body_bytes:
                raise Overloaded(
                    "The requests of this tenant that are under way are too large together.",
                    reason="tenant_bodies",
                )
            received += size_bytes
            share.body_bytes += size_bytes

        share.requests += 1
        self._exchanges[exchange.request_id] = exchange
        try:
            yield receive
        finally:
            del self._exchanges[exchange.request_id]
            share.requests -= 1
            share.body_bytes -= received
            if not share.requests:
                del self._shares[tenant]

    def all(self) -> tuple[Exchange, ...]:
        """Whatever is under way now."""
        return tuple(self._exchanges.values())


@dataclass(slots=True)
class Share:
    """What one tenant has under way."""

    requests: int = 0
    body_bytes: int = 0
