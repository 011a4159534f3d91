"""Remote images: 13 ways to a place that nobody should reach, and hosts that are slow, endless or lie."""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Iterator
from typing import Any

import pytest

from service.asks import Ask, Exchange, RawItem
from service.errors import DeadlineExceeded, ImageRejected
from service.screening.fetch import UNREACHABLE, Fetcher, Network
from tests.assets import images
from tests.integration.outside import (
    HOSTS,
    PUBLIC,
    Outside,
    Routes,
    answer,
    drip,
    flood,
    outside,
    redirect,
    silent,
)

PNG = images.encode(images.photo(64, 40), "PNG")
URL = "https://img.example/a.png"
IMAGE_BYTES = 200_000


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Outside]:
    with outside(tmp_path_factory.mktemp("outside")) as world:
        yield world


@pytest.fixture
def world(server: Outside) -> Outside:
    server.pages = {"/a.png": answer(PNG)}
    server.asked.clear()
    return server


def fetcher(world: Outside, network: Network | None = None, **options: Any) -> Fetcher:
    settings: dict[str, Any] = {
        "image_bytes": IMAGE_BYTES,
        "request_bytes": 3 * IMAGE_BYTES,
        "deadline_s": 20.0,
        "tls": ssl.create_default_context(cafile=world.authority),
        "network": network or Routes(world),
    }
    return Fetcher(**{**settings, **options})


def asking(*urls: str) -> Ask:
    documents = tuple(
        RawItem(f"documents[{index}]", None, None, url, f"documents[{index}].image", url=url)
        for index, url in enumerate(urls)
    )
    return Ask(RawItem("query", "q"), documents, None, 1, False, None, True)


async def fetched(fetch: Fetcher, *urls: str, hosts: tuple[str, ...] = HOSTS) -> Ask:
    return await fetch(Exchange("id", "", "rerank"), hosts, asking(*urls))


async def refusal(fetch: Fetcher, url: str = URL, hosts: tuple[str, ...] = HOSTS) -> ImageRejected:
    with pytest.raises(ImageRejected) as caught:
        await fetched(fetch, "https://img.example/a.png", url, hosts=hosts)
    assert caught.value.field in ("documents[0].image", "documents[1].image")
    return caught.value


async def test_an_image_of_an_allowed_host_is_fetched(world: Outside) -> None:
    ask = await fetched(fetcher(world), URL)
    (item,) = ask.documents
    assert (item.image, item.url, item.sent_image, item.image_where) == (PNG, None, URL, "documents[0].image")
    (head,) = world.asked
    sent = {line.partition(":")[0].lower() for line in head.splitlines()[1:] if line}
    assert sent == {
        "host",
        "user-agent",
        "accept",
        "accept-encoding",
        "connection",
    }  # no cookie, no credential
    assert head.startswith("GET /a.png HTTP/1.1\r\nHost: img.example\r\n")


async def test_a_url_is_fetched_once_for_a_request_and_again_for_the_next(world: Outside) -> None:
    fetch = fetcher(world)
    ask = await fetched(fetch, URL, URL, URL)
    assert [item.image for item in ask.documents] == [PNG] * 3
    assert len(world.asked) == 1
    await fetched(fetch, URL)
    assert len(world.asked) == 2


async def test_an_ask_without_urls_stays_as_it_is(world: Outside) -> None:
    ask = Ask(RawItem("query", "q", PNG), (RawItem("documents[0]", "d"),), None, 1, False, None, True)
    exchange = Exchange("id", "", "rerank")
    assert await fetcher(world)(exchange, HOSTS, ask) is ask
    assert exchange.stages_ms == {}


async def test_queries_of_pairs_are_fetched_too(world: Outside) -> None:
    queries = tuple(RawItem(f"queries[{index}]", None, None, URL, "", url=URL) for index in range(2))
    ask = Ask(queries[0], asking(URL, URL).documents, None, 2, False, None, True, queries=queries)
    filled = await fetcher(world)(Exchange("id", "", "score"), HOSTS, ask)
    assert filled.query is filled.queries[0]
    assert {item.image for item in filled.items} == {PNG}


@pytest.mark.parametrize(
    "addresses",
    [
        pytest.param(["127.0.0.1"], id="loopback"),
        pytest.param(["::1"], id="loopback v6"),
        pytest.param(["::ffff:127.0.0.1"], id="IPv4-mapped"),
        pytest.param(["0.0.0.0"], id="this host"),
        pytest.param(["::"], id="this host v6"),
        pytest.param(["64:ff9b::7f00:1"], id="NAT64"),
        pytest.param(["100.64.0.1"], id="carrier-grade NAT"),
        pytest.param(["169.254.169.254"], id="metadata"),
        pytest.param(["fd00:ec2::254"], id="metadata v6"),
        pytest.param(["10.0.0.1"], id="private"),
        pytest.param(["2002:7f00:1::"], id="6to4"),
        pytest.param(["224.0.0.1"], id="multicast"),
        pytest.param([PUBLIC, "127.0.0.1"], id="a private one beside a public one"),
        pytest.param([], id="none"),
    ],
)
async def test_a_name_with_an_address_that_is_not_public_is_never_connected_to(
    world: Outside, addresses: list[str]
) -> None:
    network = Routes(world, {"img.example": [addresses]})
    error = await refusal(fetcher(world, network))
    assert (error.reason, error.detail) == ("unreachable", UNREACHABLE)
    assert network.connected == []


@pytest.mark.parametrize(
    "host", ["2130706433", "0x7f000001", "127.1", "0177.0.0.1", "127.0.0.1", "localhost"]
)
async def test_an_address_in_disguise_is_seen_by_the_real_resolver(world: Outside, host: str) -> None:
    """A Policy cannot name such a host; if it could, this would still hold."""

    class Watched(Network):
        connected: list[str]

        async def connect(self, address: str) -> Any:
            self.connected.append(address)

    network = Watched()
    network.connected = []
    try:
        with pytest.raises(ImageRejected) as caught:
            await fetched(fetcher(world, network), f"https://{host}/a.png", hosts=(host,))
    finally:
        network.close()
    assert caught.value.reason == "unreachable"
    assert network.connected == []


async def test_a_name_that_changes_its_mind_gets_the_address_that_was_checked(world: Outside) -> None:
    network = Routes(world, {"img.example": [[PUBLIC], ["127.0.0.1"]]})
    fetch = fetcher(world, network)
    assert (await fetched(fetch, URL)).documents[0].image == PNG
    with pytest.raises(ImageRejected):  # and the next connection asks anew
        await fetched(fetch, URL)
    assert network.connected == [PUBLIC]


@pytest.mark.parametrize(
    "to",
    [
        "https://127.0.0.1/a.png",
        "https://169.254.169.254/latest/meta-data/",
        "https://[::1]/a.png",
        "http://img.example/a.png",
        "https://img.example:8443/a.png",
        "https://user@img.example/a.png",
        "https://evil.example/a.png",
        "//evil.example/a.png",
        "file:///etc/passwd",
        "",
    ],
)
async def test_a_redirect_may_lead_to_allowed_hosts_alone(world: Outside, to: str) -> None:
    world.pages["/a.png"] = redirect(to)
    network = Routes(world, {"img.example": [[PUBLIC]], "evil.example": [[PUBLIC]]})
    error = await refusal(fetcher(world, network))
    assert error.reason == "unreachable"
    assert set(network.connected) <= {PUBLIC}
    assert all("Host: img.example" in head for head in world.asked)


async def test_a_redirect_to_an_allowed_name_is_checked_like_the_first(world: Outside) -> None:
    world.pages["/a.png"] = redirect("https://cdn.example/b.png")
    network = Routes(world, {"img.example": [[PUBLIC]], "cdn.example": [["10.0.0.1"]]})
    error = await refusal(fetcher(world, network))
    assert error.detail == UNREACHABLE
    assert set(network.connected) == {PUBLIC}


async def test_two_redirects_are_followed_and_no_third(world: Outside) -> None:
    world.pages |= {
        "/1": redirect("/2"),
        "/2": redirect("https://cdn.example/a.png"),
        "/0": redirect("https://img.example/1"),
    }
    assert (await fetched(fetcher(world), "https://img.example/1")).documents[0].image == PNG
    error = await refusal(fetcher(world), "https://img.example/0")
    assert (error.reason, error.field) == ("unreachable", "documents[1].image")
    assert "redirects" in error.detail


async def test_a_slow_drip_ends_with_the_time_for_an_image(world: Outside) -> None:
    """Every read comes in time; it is the whole that is limited."""
    world.pages["/a.png"] = drip(bytes(10_000), every_s=0.05)
    start = time.monotonic()
    error = await refusal(fetcher(world, image_s=1.0))
    assert error.detail == UNREACHABLE
    assert 0.9 < time.monotonic() - start < 4.0


async def test_a_host_that_says_nothing_ends_with_the_time_for_an_image(world: Outside) -> None:
    world.pages["/a.png"] = silent
    start = time.monotonic()
    assert (await refusal(fetcher(world, image_s=1.0))).detail == UNREACHABLE
    assert time.monotonic() - start < 4.0


async def test_the_time_of_the_whole_request_holds_as_well(world: Outside) -> None:
    world.pages["/a.png"] = silent
    with pytest.raises(DeadlineExceeded):
        await fetched(fetcher(world, deadline_s=0.5), URL)


async def test_a_body_without_an_end_is_cut_at_the_limit(world: Outside) -> None:
    world.pages["/a.png"] = flood
    start = time.monotonic()
    error = await refusal(fetcher(world))
    assert (error.reason, error.limit) == ("too_many_bytes", IMAGE_BYTES)
    assert time.monotonic() - start < 2.0  # all of it takes longer


async def test_a_length_beyond_the_limit_is_not_waited_for(world: Outside) -> None:
    world.pages["/a.png"] = answer(b"x", Content_Length=str(IMAGE_BYTES + 1))
    assert (await refusal(fetcher(world))).reason == "too_many_bytes"


async def test_images_of_one_request_have_a_limit_together(world: Outside) -> None:
    body = bytes(IMAGE_BYTES)
    urls = [f"https://img.example/{index}" for index in range(4)]
    world.pages |= {f"/{index}": answer(body) for index in range(4)}
    assert len((await fetched(fetcher(world), *urls[:3])).documents) == 3
    with pytest.raises(ImageRejected, match="together") as caught:
        await fetched(fetcher(world), *urls)
    assert caught.value.reason == "too_many_bytes"


@pytest.mark.parametrize(
    ("page", "says"),
    [
        (answer(b"gone", "404 Not Found"), "404"),
        (answer(b"", "500 Internal Server Error"), "500"),
        (answer(PNG, Content_Encoding="gzip"), "compressed"),
        (answer(PNG[:100], Content_Length=str(len(PNG))), UNREACHABLE),
        (answer(PNG, "999 Nonsense Status Line \x00"), ""),
    ],
)
async def test_what_is_no_whole_plain_answer_is_refused(world: Outside, page: Any, says: str) -> None:
    world.pages["/a.png"] = page
    error = await refusal(fetcher(world))
    assert error.reason == "unreachable"
    assert says in error.detail


async def test_a_certificate_of_nobody_is_not_accepted(world: Outside) -> None:
    error = await refusal(fetcher(world, tls=ssl.create_default_context()))
    assert error.detail == UNREACHABLE
    assert world.asked == []


async def test_a_certificate_of_another_name_is_not_accepted(world: Outside) -> None:
    network = Routes(world, {"other.example": [[PUBLIC]]})
    with pytest.raises(ImageRejected) as caught:
        await fetched(fetcher(world, network), "https://other.example/a.png", hosts=("other.example",))
    assert caught.value.detail == UNREACHABLE
    assert world.asked == []


async def test_the_next_address_is_tried_where_one_does_not_answer(world: Outside) -> None:
    network = Routes(world, {"img.example": [["93.184.215.15", PUBLIC]]})
    assert (await fetched(fetcher(world, network), URL)).documents[0].image == PNG
    assert network.connected == ["93.184.215.15", PUBLIC]


async def test_no_error_says_where_a_name_led(world: Outside) -> None:
    for names in ({"img.example": [["10.1.2.3"]]}, {"img.example": [["93.184.215.99"]]}, {}):
        error = await refusal(fetcher(world, Routes(world, names)))
        assert (error.detail, error.reason, error.limit) == (UNREACHABLE, "unreachable", None)


async def test_a_caller_who_leaves_ends_what_is_fetched(world: Outside) -> None:
    world.pages["/a.png"] = silent
    fetch = fetcher(world)
    task = asyncio.create_task(fetched(fetch, URL))
    async with asyncio.timeout(5):
        while not world.asked:
            await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    world.pages["/a.png"] = answer(PNG)
    assert (await fetched(fetch, URL)).documents[0].image == PNG
