"""The text half of `bench/screening.py`: what reading a text costs, what it finds, and how often it cries wolf.

text stages     milliseconds of one core for 1,000 characters, stage by stage; a query is compared with each text
text rate       texts and characters a second through a real locked reader process, 32 texts at a time
text disguises  of 15 words in 12 disguises, how many are found
text alarms     the share of harmless texts whose highest score, code aside, reaches 0.3, 0.6, 0.8
added           a rerank of texts over HTTP, by a real service and by one that reads no text, by turns: the difference
                of the medians, in milliseconds
"""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.disguises import DISGUISES, WORDS
from bench.neutral_sentences import neutral_sentences
from bench.request import Case, make_cases, own_service
from bench.traffic import Connection, Target
from service.screening.calibration import load_calibration
from service.screening.judge import measure
from service.screening.readers import Readers
from service.screening.text import Lexicon, Reader
from service.screening.text.classifier import Classifier
from service.screening.text.code import CodeRules
from service.screening.text.folding import fold
from service.screening.text.homophones import Homophones
from service.screening.text.injection import Asked, InjectionRules
from service.screening.text.views import view
from tenants.risk import Category

DOCUMENTATION = Path(__file__).resolve().parent.parent / "docs"
UNREAD = str(Path(__file__).with_name("unread.py"))
NO_IMAGES = {"PERICARP_IMAGE_NETS": "false", "PERICARP_IMAGE_TEXT": "false", "PERICARP_SCREENERS": "1"}
"""Two services at a time start sooner without what they do not need."""
PASSAGE = 1000
AT_ONCE = 32
THRESHOLDS = (0.3, 0.6, 0.8)
QUERY = "a waterproof coat for winter"
AIM_MS, AIM_ADDED_MS = 1.0, 2.0
PAIRS, QUICK_PAIRS = 200, 15


def measure_text(*, quick: bool) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Figures and aims."""
    (texts, _) = make_cases(QUICK_PAIRS + 2 if quick else PAIRS + 2)
    documents = [text for body in texts.bodies[:8] for text in json.loads(body)["documents"]]
    sets = {
        "English": [text for text in documents if text.isascii()],
        "Chinese": [text for text in documents if not text.isascii()],
        "documentation": _documentation(),
    }
    stages = {name: _stages(group, repeats=3 if quick else 15) for name, group in sets.items()}
    added = asyncio.run(_added(texts, QUICK_PAIRS if quick else PAIRS))
    figures: list[dict[str, Any]] = [
        {"what": "text stages", "set": name, "cpu_ms_per_1000_characters": found}
        for name, found in stages.items()
    ]
    figures += [
        {"what": "text rate", **asyncio.run(_rate(documents, seconds=2.0 if quick else 10.0))},
        {"what": "text disguises", "words": len(WORDS), "found": _disguises()},
        *_alarms(
            {"documentation": _documentation(), "neutral": sorted({text for _, text in neutral_sentences()})}
        ),
        {"what": "added", **added},
    ]
    slowest = max(found["all"] for found in stages.values())
    covered = sum(found == len(WORDS) for found in _disguises().values())
    aims = [
        _aim("milliseconds of a core for 1,000 characters of text, the slowest set", AIM_MS, slowest),
        _aim(
            "milliseconds added to the p50 of a text rerank, 1 client, two cores",
            AIM_ADDED_MS,
            added["p50_ms"],
        ),
        {
            "what": "disguises of twelve in which every word is found",
            "aim": 12,
            "measured": covered,
            "ok": covered == 12,
        },
    ]
    return figures, aims


def _stages(texts: Sequence[str], *, repeats: int) -> dict[str, float]:
    """Median milliseconds of processor time for 1,000 characters; the views have folding in them."""
    lexicon = Lexicon.load()
    homophones, injection, code, classifier = (
        Homophones(lexicon),
        InjectionRules(),
        CodeRules(),
        Classifier.read(),
    )
    reader, asked = Reader(), Asked.of(QUERY)
    views = [view(text) for text in texts]
    stages: dict[str, Callable[[], object]] = {
        "fold": lambda: [fold(text) for text in texts],
        "views": lambda: [view(text) for text in texts],
        "terms": lambda: [lexicon.search(each) for each in views],
        "homophones": lambda: [homophones.search(each) for each in views],
        "injection": lambda: [injection.search(each, asked) for each in views],
        "code": lambda: [code.search(each) for each in views],
        "classifier": lambda: [
            classifier.search(views[at : at + AT_ONCE]) for at in range(0, len(views), AT_ONCE)
        ],
        "all": lambda: [
            reader.read(texts[at : at + AT_ONCE], query=QUERY) for at in range(0, len(texts), AT_ONCE)
        ],
    }
    thousands = sum(map(len, texts)) / 1000
    taken: dict[str, list[float]] = {name: [] for name in stages}
    for _ in range(repeats):
        for name, work in stages.items():
            began = time.process_time()
            work()
            taken[name].append((time.process_time() - began) * 1000 / thousands)
    return {name: round(statistics.median(found), 4) for name, found in taken.items()}


async def _rate(texts: Sequence[str], *, seconds: float) -> dict[str, float]:
    readers = Readers(timeout_s=30.0)
    await readers.start()
    try:
        batch = list(texts[:AT_ONCE])
        await readers.read(batch, query=QUERY)
        done, began = 0, time.perf_counter()
        while time.perf_counter() - began < seconds:
            await readers.read(batch, query=QUERY)
            done += 1
        taken = time.perf_counter() - began
    finally:
        await readers.close()
    characters = sum(map(len, batch))
    return {
        "texts_s": round(done * len(batch) / taken),
        "characters_s": round(done * characters / taken),
        "request_ms": round(taken / done * 1000, 2),
        "characters": characters,
    }


def _disguises() -> dict[str, int]:
    reader = Reader()
    return {
        name: sum(
            bool(findings.signals)
            for findings in reader.read(
                [f"They were talking about {disguise(word)} in the kitchen." for word in WORDS]
            )
        )
        for name, disguise in DISGUISES.items()
    }


def _alarms(sets: dict[str, list[str]]) -> list[dict[str, Any]]:
    reader, tables = Reader(), load_calibration()
    found = []
    for name, texts in sets.items():
        highest = [
            max(
                (risk.score for risk in measure(each, tables) if risk.category is not Category.CODE),
                default=0.0,
            )
            for each in reader.read(texts)
        ]
        share = {
            str(least): round(sum(score >= least for score in highest) / len(texts), 4)
            for least in THRESHOLDS
        }
        found.append({"what": "text alarms", "set": name, "texts": len(texts), "share": share})
    return found


def _documentation() -> list[str]:
    """This project's own pages in passages: SQL, HTML, paths, and much talk of ranking, hate and weapons."""
    pages = [path.read_text("utf-8") for path in sorted(DOCUMENTATION.glob("*.md"))]
    return [page[at : at + PASSAGE] for page in pages for at in range(0, len(page), PASSAGE)]


async def _added(case: Case, pairs: int) -> dict[str, float]:
    """One request to each service by turns, the first by turns too; each body is new to both."""
    with own_service(settings=NO_IMAGES) as reading, own_service(UNREAD, settings=NO_IMAGES) as unread:
        targets: tuple[Target, ...] = (reading, unread)
        connections = [Connection(target) for target in targets]
        for connection in connections:
            await connection.open()
        wall: list[list[float]] = [[], []]
        clean: list[list[float]] = [[], []]
        for number, body in enumerate(case.bodies[: pairs + 2]):
            for place in (0, 1) if number % 2 else (1, 0):
                sample = await connections[place].post(body)
                if number >= 2:
                    wall[place].append(sample.outside_ms)
                    clean[place].append(sample.stages_ms.get("clean", 0.0))
        for connection in connections:
            await connection.close()
    with_reading, without = (statistics.median(each) for each in wall)
    return {
        "requests": len(wall[0]),
        "documents": case.documents,
        "p50_ms": round(with_reading - without, 2),
        "outside_worker_p50_ms": round(with_reading, 2),
        "outside_worker_unread_p50_ms": round(without, 2),
        "clean_p50_ms": round(statistics.median(clean[0]), 2),
        "clean_unread_p50_ms": round(statistics.median(clean[1]), 2),
    }


def _aim(what: str, aim: float, measured: float) -> dict[str, Any]:
    return {"what": what, "aim": f"<= {aim:g} ms", "measured": measured, "ok": measured <= aim}
