"""Screening through real child processes: hostile images in, pixels or a refusal out, and no child lost unnoticed."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from models import Pixels
from service.errors import ImageRejected, ScreeningLost
from service.processes.children import Child
from service.screening import REASONS, Cleaned, ImageFormat, ImageLimits
from service.screening.messages import REGION_BYTES, CleanReply, CleanRequest, EncodeReply, vocabulary
from service.screening.pool import Screen
from service.screening.resize import MAX_CLEAN_PIXELS
from service.screening.signals import Looks
from tests.assets import images
from tests.corpus import odd_files

LIMITS = ImageLimits(bytes=16 * 2**20, pixels=40_000_000, side=16_384, aspect=200, frames=1)

JPEG = images.encode(images.photo(64, 40), "JPEG")
PNG = images.encode(images.photo(64, 40), "PNG")
WEBP = images.encode(images.photo(64, 40), "WEBP")
SLOW = images.encode(images.photo(6000, 5000), "JPEG", progressive=True)
"""Takes about a second, so that there is a middle to kill it in."""


@pytest.fixture
async def screen() -> AsyncIterator[Screen]:
    screen = Screen(limits=LIMITS, children=2, timeout_s=10.0)
    await screen.start()
    yield screen
    await screen.close()


async def refusal(screen: Screen, *sent: bytes) -> ImageRejected:
    with pytest.raises(ImageRejected) as caught:
        await screen.clean(sent)
    assert caught.value.reason in REASONS
    return caught.value


def children(screen: Screen) -> list[Child]:
    return [slot.child for slot in screen._slots if slot.child is not None]


async def until(what: object) -> None:
    assert callable(what)
    async with asyncio.timeout(20):
        while not what():
            await asyncio.sleep(0.01)


async def test_images_come_back_in_order_with_what_was_left_behind(screen: Screen) -> None:
    sent = [
        JPEG,
        images.secretive_png(PNG, orientation=6),
        WEBP,
        images.encode(images.photo(2000, 1500), "JPEG"),
    ]
    first, second, third, fourth = await screen.clean(sent)
    assert (first.format, first.width, first.height, first.metadata, first.trailing_bytes) == (
        "jpeg",
        64,
        40,
        (),
        0,
    )
    assert (second.format, second.width, second.height) == ("png", 40, 64)
    assert second.metadata == ("c2pa", "exif", "icc", "text", "time", "unknown", "xmp")
    assert second.trailing_bytes == len(images.SECRETS["trailing"])
    assert third.format == "webp"
    assert (fourth.width, fourth.height) == (2000, 1500)
    assert fourth.pixels.width * fourth.pixels.height <= 1_003_520


async def test_children_hold_no_rights(screen: Screen) -> None:
    for child in children(screen):
        measures = {measure.name: measure for measure in child.hello.sandbox}
        names = {"core", "open_files", "file_size", "address_space", "no_new_privs", "not_dumpable"}
        names |= {"uid"} if os.geteuid() == 0 else set()
        assert names <= {name for name, measure in measures.items() if measure.held}


async def test_a_clean_file_is_written_in_the_child(screen: Screen) -> None:
    again = await screen.reencode(images.secretive_jpeg(JPEG, orientation=8), "webp")
    assert (again.format, again.width, again.height) == ("webp", 40, 64)
    assert [secret for secret in images.SECRETS.values() if secret in again.image] == []
    (cleaned,) = await screen.clean([again.image])
    assert (cleaned.format, cleaned.metadata, cleaned.trailing_bytes) == ("webp", (), 0)
    with pytest.raises(ImageRejected, match="JPEG, PNG and WebP"):
        await screen.reencode(b"text")


@pytest.mark.parametrize("form", ["jpeg", "png", "webp"])
async def test_the_largest_images_can_be_written_again(screen: Screen, form: ImageFormat) -> None:
    """40 million pixels, turned, fit into the child's memory and its time."""
    flat = images.photo(50, 40).resize((8000, 5000))
    data = images.encode(flat, "JPEG", quality=60, exif=b"Exif\0\0" + images.tiff_block(6))
    again = await screen.reencode(data, form)
    assert (again.width, again.height) == (5000, 8000)


async def test_a_child_that_writes_what_was_not_asked_for_is_not_believed(screen: Screen) -> None:
    (slot, _) = screen._slots
    png = EncodeReply(1, PNG, "png", 64, 40, (), 0)
    assert screen._trust_file(slot, png, None) is not None
    for lie, form in (
        (png, "jpeg"),
        (replace(png, image=b"<html>"), None),
        (replace(png, format="gif"), None),
        (replace(png, width=10**6), None),
        (replace(png, metadata=("secret",)), None),
        (replace(png, image=PNG + bytes(LIMITS.bytes)), None),
        (CleanRequest(1, PNG), None),
    ):
        assert screen._trust_file(slot, lie, form) is None  # type: ignore[arg-type]


async def test_a_child_that_says_it_left_more_pixels_than_there_may_be_is_not_believed(
    screen: Screen,
) -> None:
    (slot, _) = screen._slots
    reply = CleanReply(1, 64, 40, 64, 40, "png", (), 0)
    left = screen._trust_pixels(slot, reply, Looks())
    assert left is not None and left.pixels == Pixels(64, 40, bytes(64 * 40 * 3))
    for columns, rows in ((0, 40), (64, 0), (-64, -40), (MAX_CLEAN_PIXELS + 1, 1), (2**31, 2**31)):
        lie = replace(reply, columns=columns, rows=rows)
        assert screen._trust_pixels(slot, lie, Looks()) is None


@pytest.mark.parametrize(
    ("secretive", "plain"),
    [
        (images.secretive_jpeg(JPEG), JPEG),
        (images.secretive_png(PNG), PNG),
        (images.secretive_webp(WEBP, (64, 40)), WEBP),
    ],
)
async def test_nothing_but_pixels_leaves_the_child(screen: Screen, secretive: bytes, plain: bytes) -> None:
    (slot, _) = screen._slots
    assert slot.child is not None and slot.region is not None
    reply = await slot.child.ask(CleanRequest(10**9, secretive))
    assert isinstance(reply, CleanReply)
    frame = b"".join(vocabulary(LIMITS).encode(reply))
    pixels = slot.region.take(REGION_BYTES)
    assert [secret for secret in images.SECRETS.values() if secret in frame + pixels] == []
    assert len(frame) < 300
    (cleaned,) = await screen.clean([plain])
    assert (cleaned.pixels.width, cleaned.pixels.height) == (reply.columns, reply.rows)
    assert pixels == cleaned.pixels.data.ljust(REGION_BYTES, b"\0")


async def test_the_same_bytes_are_decoded_once(screen: Screen) -> None:
    before = sum(slot.images for slot in screen._slots)
    cleaned = await screen.clean([JPEG, PNG, JPEG, JPEG])
    assert cleaned[0] is cleaned[2] is cleaned[3]
    assert sum(slot.images for slot in screen._slots) == before + 2


async def test_the_first_refused_image_is_named(screen: Screen) -> None:
    error = await refusal(screen, JPEG, SLOW[:-1000], b"GIF89a", b"text")
    assert (error.index, error.reason) == (1, "damaged")
    error = await refusal(screen, JPEG, JPEG, b"text")
    assert (error.index, error.reason) == (2, "format")


async def test_no_images_is_no_work(screen: Screen) -> None:
    assert await screen.clean([]) == []


async def test_floods_and_bombs_are_refused_at_once(screen: Screen) -> None:
    for hostile, reason in (
        (images.huge_png(), "too_many_pixels"),
        (images.scan_bomb(2000, 500), "too_complex"),
        (bytes(LIMITS.bytes + 1), "too_many_bytes"),
        (images.animation("PNG"), "animated"),
        (images.animation("WEBP"), "animated"),
        (images.animation("GIF"), "format"),
    ):
        start = time.perf_counter()
        assert (await refusal(screen, hostile)).reason == reason
        assert time.perf_counter() - start < 1.0


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
async def test_the_largest_images_fit_into_the_child(screen: Screen, form: str) -> None:
    """Of the shapes that cost a decoder most memory: progressive without subsampling, alpha, a turn."""
    options: dict[str, object] = {"exif": b"Exif\0\0" + images.tiff_block(6)}
    if form == "JPEG":
        options |= {"progressive": True, "subsampling": 0}
    flat = images.photo(50, 40, "RGB" if form == "JPEG" else "RGBA").resize((8000, 5000))
    options |= {"compress_level": 1} if form == "PNG" else {"quality": 30, "method": 0}
    data = images.encode(flat, form, **options)
    (cleaned,) = await screen.clean([data])
    assert (cleaned.width, cleaned.height) == (5000, 8000)


async def test_a_child_killed_at_work_refuses_its_image_and_is_replaced(screen: Screen) -> None:
    work = asyncio.create_task(screen.clean([SLOW]))
    await until(lambda: len(screen._idle) == 1)
    await asyncio.sleep(0.1)
    (busy,) = [child for child in children(screen) if child._waiting]
    os.kill(busy.pid, signal.SIGKILL)
    with pytest.raises(ImageRejected) as caught:
        await work
    assert (caught.value.reason, caught.value.index) == ("crashed", 0)
    assert len(await screen.clean([JPEG, PNG, WEBP])) == 3
    await until(lambda: len(screen._idle) == 2)
    assert busy.pid not in {child.pid for child in children(screen)}
    assert screen.losses == {"died": 1}


async def test_a_hung_child_is_a_timeout_and_is_replaced() -> None:
    screen = Screen(limits=LIMITS, children=1, timeout_s=0.5)
    await screen.start()
    try:
        (hung,) = children(screen)
        os.kill(hung.pid, signal.SIGSTOP)
        start = time.perf_counter()
        assert (await refusal(screen, JPEG)).reason == "timeout"
        assert time.perf_counter() - start < 3.0
        assert len(await screen.clean([JPEG])) == 1
        assert children(screen)[0].pid != hung.pid
        assert screen.losses == {"overdue": 1}
    finally:
        await screen.close()


async def test_a_child_that_dies_idle_costs_no_image(screen: Screen) -> None:
    pids = {child.pid for child in children(screen)}
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    await until(lambda: not any(child.pid in pids and child.alive for child in children(screen)))
    assert len(await screen.clean([JPEG, PNG])) == 2
    await until(lambda: screen.ready)


async def test_a_child_on_which_the_decoder_choked_is_replaced_and_one_that_only_walked_is_not(
    screen: Screen,
) -> None:
    before = {child.pid for child in children(screen)}
    await refusal(screen, b"text")
    await refusal(screen, PNG[:-5])
    assert {child.pid for child in children(screen)} == before
    await refusal(screen, images.draw_png(10, 10, 8, 2, bytes(5)))
    await until(lambda: len(screen._idle) == 2)
    assert len({child.pid for child in children(screen)} & before) == 1
    assert screen.losses == {"decoder": 1}


async def test_a_child_retires_after_its_share_of_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.screening.pool.RECYCLE_IMAGES", 3)
    screen = Screen(limits=LIMITS, children=1, timeout_s=10.0)
    await screen.start()
    try:
        pids = set()
        for _ in range(9):
            await screen.clean([JPEG])
            pids |= {child.pid for child in children(screen)}
        assert 3 <= len(pids) <= 4
        assert not screen.losses, "they were well"
    finally:
        await screen.close()


async def test_small_images_use_the_memory_of_those_before() -> None:
    """Pages that a child gives back are cleared before it gets them again: that costs as much as decoding."""
    screen = Screen(limits=LIMITS, children=1, timeout_s=10.0)
    await screen.start()
    try:
        (child,) = children(screen)

        def faults() -> int:
            # proc(5): what follows the name in parentheses begins with field 3, minflt is field 10.
            return int(Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[7])

        whole = images.photo(300, 300)
        photos = [
            images.encode(whole.crop((each, each, each + 224, each + 224)), "JPEG") for each in range(60)
        ]
        await screen.clean(photos[:20])
        before = faults()
        await screen.clean(photos[20:])
        assert (
            faults() - before < 40 * 20
        )  # an image of these is 37 pages, and its decoding takes three times as many
    finally:
        await screen.close()


async def test_a_caller_who_leaves_keeps_no_slot(screen: Screen) -> None:
    leaving = [asyncio.create_task(screen.clean([SLOW, JPEG, PNG])) for _ in range(6)]
    await asyncio.sleep(0.05)
    for task in leaving:
        task.cancel()
    assert all(
        isinstance(end, asyncio.CancelledError)
        for end in await asyncio.gather(*leaving, return_exceptions=True)
    )
    assert len(await screen.clean([JPEG, WEBP])) == 2
    await until(lambda: len(screen._idle) == 2)


async def test_one_image_need_not_wait_for_a_thousand(screen: Screen) -> None:
    many = [images.encode(images.photo(500, 400, seed=seed), "PNG") for seed in range(40)]
    flood = asyncio.create_task(screen.clean(many * 5))
    await asyncio.sleep(0.02)
    await screen.clean([JPEG])
    assert not flood.done()
    assert len(await flood) == 200


async def test_a_tenant_with_a_hundred_requests_does_not_shut_out_another(screen: Screen) -> None:
    many = [images.encode(images.photo(300, 200, seed=seed), "PNG") for seed in range(60)]
    flood = [asyncio.create_task(screen.clean([image], tenant="noisy")) for image in many]
    await asyncio.sleep(0.02)
    await screen.clean([JPEG], tenant="quiet")
    done = sum(task.done() for task in flood)
    await asyncio.gather(*flood)
    assert done < 10, "it waited for those under way, and for one more for each place"


async def test_closing_ends_who_waits() -> None:
    screen = Screen(limits=LIMITS, children=1, timeout_s=10.0)
    await screen.start()
    pids = [child.pid for child in children(screen)]
    waiting = [asyncio.create_task(screen.clean([SLOW])) for _ in range(3)]
    await asyncio.sleep(0.05)
    await screen.close()
    ends = await asyncio.gather(*waiting, return_exceptions=True)
    assert [type(end) for end in ends] == [ScreeningLost] * 3
    with pytest.raises(ScreeningLost):
        await screen.clean([JPEG])
    assert not screen.ready
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


async def test_a_closed_pool_may_start_again() -> None:
    screen = Screen(limits=LIMITS, children=1, timeout_s=10.0)
    for _ in range(2):
        await screen.start()
        assert len(await screen.clean([JPEG, PNG])) == 2
        await screen.close()


async def test_a_pool_that_cannot_start_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "/nonexistent/python")
    screen = Screen(limits=LIMITS, children=2, timeout_s=1.0)
    with pytest.raises(ScreeningLost):
        await screen.start()
    assert not screen.ready


async def test_a_pool_whose_children_no_longer_start_says_so(screen: Screen) -> None:
    screen._launch = type(screen._launch)(argv=("/nonexistent/python",), vocabulary=screen._launch.vocabulary)
    for child in children(screen):
        os.kill(child.pid, signal.SIGKILL)
    await until(lambda: not screen.ready)
    with pytest.raises(ScreeningLost):
        await screen.clean([JPEG])


async def test_flipped_bytes_are_pixels_or_a_refusal(screen: Screen) -> None:
    """Through the child: it is never lost over an image without saying so."""
    loop = asyncio.get_running_loop()

    @settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.sampled_from([JPEG, PNG, WEBP, images.secretive_jpeg(JPEG)]), st.data())
    def flip(original: bytes, drawn: st.DataObject) -> None:
        data = bytearray(original)
        for _ in range(drawn.draw(st.integers(1, 6))):
            data[drawn.draw(st.integers(0, len(data) - 1))] = drawn.draw(st.integers(0, 255))
        try:
            (cleaned,) = asyncio.run_coroutine_threadsafe(screen.clean([bytes(data)]), loop).result(30)
        except ImageRejected as exc:
            assert exc.reason in set(REASONS) - {"timeout", "crashed"}
            return
        assert isinstance(cleaned, Cleaned)

    await asyncio.to_thread(flip)


async def test_the_corpus_of_odd_files(screen: Screen) -> None:
    files = odd_files()
    surprises: list[str] = []
    for file in files:
        start = time.perf_counter()
        try:
            await screen.clean([file.data])
            reason = None
        except ImageRejected as exc:
            reason = exc.reason
        elapsed_s = time.perf_counter() - start
        if not file.may_be(reason) or elapsed_s > 5.0:
            surprises.append(f"{file.name}: {file.suggest}, {reason} after {elapsed_s:.1f} s")
    assert len(files) > 600
    assert surprises == []
