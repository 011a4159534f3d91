"""Scores of the packed forward are the reference's: measured on a fixed set of all pairings of text and image.

The reference is the stock model in fp32, one candidate at a time, through its own mask, positions and full
vocabulary (`QwenReranker.score_dense`). What is packed may differ from it by the order of sums in fp32, and never
change an order. In bf16 products round, so the packed forward is held to the same products one candidate at a time,
and to be no farther from fp32 than the stock model in bf16 is.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from pathlib import Path

import numpy as np
import pytest
import torch

from models import DEMO, Item, Job, Pixels
from models.qwen import QwenReranker
from models.tensors import native_dtype
from tests.tiny_qwen import save_checkpoint

FP32, BF16 = 1e-4, 2e-2
"""The most that z_yes - z_no may be off."""
INSTRUCTIONS = (None, "", "Find the product that the buyer asks for")
KINDS = ("text", "image", "both")
WORDS = [
    *(
        "red",
        "blue",
        "cheap",
        "shoe",
        "shoes",
        "boot",
        "car",
        "dog",
        "house",
        "mountain",
        "of",
        "the",
        "with",
    ),
    *("a", "rubber", "sole", "for", "kids", "红色", "蓝色", "鞋", "汽车", "狗", "便宜的", "👟", "🚗"),
    *("def", "return", ":", "(", ")", ";", ",", ".", "?"),
]


def text(rng: random.Random, words: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(words))


def image(rng: random.Random) -> Pixels:
    """Discs and bars of one colour each on a ground of another."""
    width, height = rng.randint(40, 260), rng.randint(40, 260)
    y, x = np.mgrid[0:height, 0:width]
    canvas = np.full((height, width, 3), [rng.randrange(256) for _ in range(3)], np.uint8)
    for _ in range(5):
        right, down, size = abs(x - rng.randrange(width)), abs(y - rng.randrange(height)), rng.randint(8, 60)
        inside = right**2 + down**2 < size**2 if rng.random() < 0.5 else (right < size) & (down < size // 2)
        canvas[inside] = [rng.randrange(256) for _ in range(3)]
    return Pixels(width, height, canvas.tobytes())


def item(rng: random.Random, kind: str, words: int) -> Item:
    return Item(
        None if kind == "image" else text(rng, rng.randint(1, words)),
        None if kind == "text" else image(rng),
    )


def make_jobs() -> tuple[Job, ...]:
    """Nine jobs of six candidates: every kind of query under every instruction, every kind of candidate twice."""
    jobs = []
    for seed, (instruction, kind) in enumerate(product(INSTRUCTIONS, KINDS)):
        rng = random.Random(seed)
        candidates = tuple(item(rng, each, 80) for each in (*KINDS, *KINDS))
        jobs.append(Job(item(rng, kind, 30), candidates, instruction))
    return tuple(jobs)


JOBS = make_jobs()
Margins = list[tuple[float, ...]]


@dataclass(frozen=True)
class Measured:
    """One checkpoint in fp32, and the reference's margins of all jobs."""

    name: str
    reranker: QwenReranker
    dense: Margins


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=["demo", "tiny"])
def measured(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Measured:
    return measure(DEMO if request.param == "demo" else str(tiny(tmp_path_factory)))


@pytest.fixture(scope="module")
def demo() -> Measured:
    return measure(DEMO)


def tiny(folders: pytest.TempPathFactory) -> Path:
    return save_checkpoint(folders.mktemp("tiny"))


def measure(name: str) -> Measured:
    reranker = QwenReranker.load(name, device="cpu", dtype="fp32")
    return Measured(name, reranker, [reranker.score_dense(job).margins for job in JOBS])


def score(reranker: QwenReranker) -> Margins:
    return [reranker.score(job).margins for job in JOBS]


def off(margins: Margins, wanted: Margins) -> float:
    """The largest difference."""
    return max(
        abs(a - b)
        for ours, theirs in zip(margins, wanted, strict=True)
        for a, b in zip(ours, theirs, strict=True)
    )


def kendall(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Kendall's tau-a: 1 where every two candidates are in the same order on both sides."""
    agreed = [
        np.sign(ours[a] - ours[b]) * np.sign(theirs[a] - theirs[b])
        for a, b in combinations(range(len(ours)), 2)
    ]
    return float(np.mean(agreed))


def test_the_set_can_tell(demo: Measured) -> None:
    """Margins far apart, no two alike: an order that changes shows."""
    assert np.std(np.concatenate(demo.dense)) > 1
    for margins in demo.dense:
        assert min(abs(a - b) for a, b in combinations(margins, 2)) > 2 * FP32
    assert kendall((1.0, 2.0, 3.0), (1.0, 3.0, 2.0)) == pytest.approx(1 / 3)


@pytest.mark.parametrize("pack_tokens", [150, 1024])
def test_fp32_scores_and_orders_are_the_references(measured: Measured, pack_tokens: int) -> None:
    reranker = QwenReranker.load(measured.name, device="cpu", dtype="fp32", pack_tokens=pack_tokens)
    margins = score(reranker)
    assert off(margins, measured.dense) <= FP32
    assert [kendall(a, b) for a, b in zip(margins, measured.dense, strict=True)] == [1.0] * len(JOBS)


def test_bf16_scores_depend_on_no_company_and_no_form(demo: Measured) -> None:
    """Packed, packed small, and each candidate alone through the dense form: the same products, the same rounding."""
    packed = score(QwenReranker.load(DEMO, device="cpu", dtype="bf16"))
    small = QwenReranker.load(DEMO, device="cpu", dtype="bf16", pack_tokens=150)
    dense = QwenReranker.load(DEMO, device="cpu", dtype="bf16", attention_form="dense")
    alone = [
        tuple(dense.score(Job(job.query, (each,), job.instruction)).margins[0] for each in job.candidates)
        for job in JOBS
    ]
    assert off(packed, alone) <= BF16
    assert off(score(small), alone) <= BF16


@pytest.mark.skipif(
    native_dtype(torch.device("cpu")) != "bf16", reason="a CPU that only imitates bf16 rounds otherwise"
)
def test_bf16_scores_are_nearer_to_fp32_than_the_references_own(demo: Measured) -> None:
    """The stock model in bf16 does not agree with itself to `BF16`: its kinds of attention differ by more than that."""
    half = QwenReranker.load(DEMO, device="cpu", dtype="bf16")
    stock = [half.score_dense(job).margins for job in JOBS]
    assert off(score(half), demo.dense) < off(stock, demo.dense)
