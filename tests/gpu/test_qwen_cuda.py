"""The same scores on a CUDA device: dense form, bf16 and fp32. Skipped without one."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from models import Item, Job, Pixels
from models.qwen import QwenReranker
from tests.tiny_qwen import save_checkpoint

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def make_job(seed: int) -> Job:
    rng = random.Random(seed)
    image = Pixels(90, 60, rng.randbytes(90 * 60 * 3))
    candidates = tuple(Item("red shoe " * rng.randint(1, 30), rng.choice([None, image])) for _ in range(20))
    return Job(Item("红色的鞋", image), candidates)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 1e-3), ("bf16", 0.25)])
@pytest.mark.parametrize("budget", [4096, 200])
def test_packed_scores_are_the_references(
    checkpoint: Path, dtype: str, tolerance: float, budget: int
) -> None:
    reranker = QwenReranker.load(str(checkpoint), device="cuda", dtype=dtype)
    reranker._pack_tokens = budget
    assert reranker.card.attention == "dense"
    job = make_job(budget)
    packed, dense = reranker.score(job), reranker.score_dense(job)
    assert max(abs(a - b) for a, b in zip(packed.margins, dense.margins, strict=True)) <= tolerance


def test_the_device_agrees_with_the_cpu(checkpoint: Path) -> None:
    job = make_job(1)
    here = QwenReranker.load(str(checkpoint), device="cpu").score(job)
    there = QwenReranker.load(str(checkpoint), device="cuda", dtype="fp32").score(job)
    assert max(abs(a - b) for a, b in zip(here.margins, there.margins, strict=True)) <= 1e-3


def test_the_default_on_a_gpu_is_bf16(checkpoint: Path) -> None:
    card = QwenReranker.load(str(checkpoint)).card
    assert (card.device, card.dtype) == ("cuda", "bf16")
