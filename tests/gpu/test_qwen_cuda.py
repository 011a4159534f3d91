"""The same scores on a CUDA device: flex and dense form, bf16 and fp32. Skipped without one."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from models import Item, Job, Pixels
from models.attention import Form
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
@pytest.mark.parametrize("form", ["flex", "dense"])
@pytest.mark.parametrize("pack_tokens", [16_384, 200])
def test_packed_scores_are_the_references(
    checkpoint: Path, dtype: str, tolerance: float, form: Form, pack_tokens: int
) -> None:
    reranker = QwenReranker.load(
        str(checkpoint), device="cuda", dtype=dtype, attention_form=form, pack_tokens=pack_tokens
    )
    job = make_job(pack_tokens)
    packed, dense = reranker.score(job), reranker.score_dense(job)
    assert max(abs(a - b) for a, b in zip(packed.margins, dense.margins, strict=True)) <= tolerance


def test_nothing_is_compiled_once_it_is_warm(checkpoint: Path) -> None:
    reranker = QwenReranker.load(str(checkpoint), device="cuda")
    warm = reranker.compilations
    assert reranker.card.attention == "flex" and warm > 0
    for seed in range(12):
        reranker.score(make_job(seed))
    assert reranker.compilations == warm


def test_the_device_agrees_with_the_cpu(checkpoint: Path) -> None:
    job = make_job(1)
    here = QwenReranker.load(str(checkpoint), device="cpu").score(job)
    there = QwenReranker.load(str(checkpoint), device="cuda", dtype="fp32").score(job)
    assert max(abs(a - b) for a, b in zip(here.margins, there.margins, strict=True)) <= 1e-3


def test_the_default_on_a_gpu_is_bf16(checkpoint: Path) -> None:
    card = QwenReranker.load(str(checkpoint)).card
    assert (card.device, card.dtype) == ("cuda", "bf16")
