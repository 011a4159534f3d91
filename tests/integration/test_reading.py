"""Texts are read in a locked process: findings come back in order, and a reader that dies or hangs is never silence."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from service.errors import ScreeningLost
from service.processes.children import Child
from service.screening.readers import Readers
from service.screening.reading import MOST_CHARACTERS, READERS_KEPT, OwnList, Shelf
from service.screening.text import DETECTORS, Reader
from service.screening.text.classifier import WEIGHTS
from tenants.risk import Category

ROOT = Path(__file__).resolve().parents[2]
ARMS = "how to build a pipe bomb at home"
PLAIN = "a recipe for apple cake"
OWN = (OwnList(Category.DRUGS, ("blue sugar", "蓝色糖果")),)


@pytest.fixture
async def readers() -> AsyncIterator[Readers]:
    readers = Readers(timeout_s=10.0)
    await readers.start()
    yield readers
    await readers.close()


def child(readers: Readers) -> Child:
    assert readers._child is not None
    return readers._child


async def test_findings_come_back_in_the_order_of_the_texts(readers: Readers) -> None:
    found = await readers.read([PLAIN, ARMS, PLAIN])
    assert [bool(each.signals) for each in found] == [False, True, False]
    assert {signal.category for signal in found[1].signals} == {Category.WEAPONS}
    assert all(each.failed == () for each in found)
    assert await readers.read([]) == ()


async def test_the_reader_is_locked_in_and_says_what_it_reads_with(readers: Readers) -> None:
    assert {measure.name for measure in readers.sandbox if measure.held} >= {
        "open_files",
        "address_space",
        "no_new_privs",
        "not_dumpable",
    }
    assert {detector.name for detector in readers.detectors} == set(DETECTORS)
    assert all(detector.active and detector.version for detector in readers.detectors)


async def test_a_tenants_own_words_count_for_it_and_for_nobody_else(readers: Readers) -> None:
    texts = ["buy Blue Sugar today", "本店有蓝色糖果", PLAIN]
    own = await readers.read(texts, lists=OWN)
    assert [bool(each.signals) for each in own] == [True, True, False]
    assert {signal.rule for each in own for signal in each.signals} == {"lexicon.own-drugs"}
    assert not any(each.signals for each in await readers.read(texts))


async def test_a_tenants_words_are_besides_the_lists_of_the_service(readers: Readers) -> None:
    (found,) = await readers.read([ARMS], lists=OWN)
    assert {signal.category for signal in found.signals} == {Category.WEAPONS}


async def test_lists_that_make_no_lexicon_are_a_detector_that_failed(readers: Readers) -> None:
    (found,) = await readers.read([PLAIN], lists=(OwnList(Category.DRUGS, ("!!",)),))
    assert found.failed == ("lexicon",)


async def test_more_text_than_one_request_holds_goes_in_several(readers: Readers) -> None:
    long = "apple " * (MOST_CHARACTERS // 12)
    found = await readers.read([long, long, f"{long} {ARMS}", PLAIN, long])
    armed = [any(signal.category is Category.WEAPONS for signal in each.signals) for each in found]
    assert armed == [False, False, True, False, False]


async def test_a_query_is_not_stuffed_with_its_own_words(readers: Readers) -> None:
    query = "cheap red running shoes"
    stuffed = " ".join([query] * 8)
    of_query, of_stuffed, again = await readers.read([query, stuffed, query], query=query)
    assert of_query == again
    assert not any(signal.category is Category.INJECTION for signal in of_query.signals)
    assert any(signal.category is Category.INJECTION for signal in of_stuffed.signals)


async def test_a_reader_that_dies_idle_is_replaced(readers: Readers) -> None:
    before = child(readers)
    os.kill(before.pid, signal.SIGKILL)
    async with asyncio.timeout(20):
        while not (readers.ready and child(readers) is not before):
            await asyncio.sleep(0.01)
    assert (await readers.read([ARMS]))[0].signals


async def test_texts_that_a_dying_reader_held_are_failed_and_never_clean(readers: Readers) -> None:
    os.kill(child(readers).pid, signal.SIGSTOP)
    reading = asyncio.create_task(readers.read([PLAIN, ARMS]))
    await asyncio.sleep(0.1)
    os.kill(child(readers).pid, signal.SIGKILL)
    assert [set(each.failed) for each in await reading] == [set(DETECTORS)] * 2
    assert (await readers.read([PLAIN]))[0].failed == ()
    assert readers.losses == {"died": 1}


async def test_a_reader_that_hangs_is_killed_within_its_time() -> None:
    readers = Readers(timeout_s=0.3)
    await readers.start()
    try:
        hung = child(readers)
        os.kill(hung.pid, signal.SIGSTOP)
        (found,) = await readers.read([PLAIN])
        assert set(found.failed) == set(DETECTORS)
        assert not hung.alive
        await asyncio.sleep(0)  # who counts is told in the loop's next turn
        assert readers.losses == {"overdue": 1}
    finally:
        await readers.close()


async def test_a_reader_without_the_classifiers_weights_says_so_and_has_failed_on_every_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("service", "tenants", "models"):
        shutil.copytree(
            ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__", "demo")
        )
    weights = tmp_path / WEIGHTS.relative_to(ROOT)
    weights.write_bytes(weights.read_bytes()[:-1])
    monkeypatch.chdir(tmp_path)  # where `python -m` looks first
    told: list[str] = []
    readers = Readers(timeout_s=10.0, told=told.append)
    await readers.start()
    try:
        assert [each.name for each in readers.detectors if not each.active] == ["classifier"]
        plain, armed = await readers.read([PLAIN, ARMS])
        assert plain.failed == armed.failed == ("classifier",)
        assert armed.signals
    finally:
        await readers.close()
    assert any("classifier" in line for line in told)


async def test_after_close_nothing_is_read(readers: Readers) -> None:
    await readers.close()
    with pytest.raises(ScreeningLost):
        await readers.read([PLAIN])


def test_readers_of_own_lists_are_kept_and_bounded() -> None:
    shelf = Shelf(Reader())
    first = shelf.reader(OWN)
    assert shelf.reader(OWN) is first
    assert shelf.reader(()) is not first
    for number in range(READERS_KEPT):
        shelf.reader((OwnList(Category.DRUGS, (f"word {number}",)),))
    assert shelf.reader(OWN) is not first
