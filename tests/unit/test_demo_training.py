"""What the demo model is trained on and measured with: rows, scenes, passages, held-out splits, calibration, BM25."""

from __future__ import annotations

import functools
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from models.demo import bm25, calibration, data, evaluate, muon, passages, questions, scenes, views
from models.demo.model import Entry, Packer, Row, read_states, score_rows
from models.weights import DEMO_DIRECTORY

DATA = Path(__file__).parents[3] / "shared" / "data" / "train"
needs_data = pytest.mark.skipif(
    not DATA.is_dir(), reason="the training data is not here: ../shared/data/train"
)


@pytest.fixture(scope="module")
def corpus() -> data.Corpus:
    return data.load_corpus(DATA, Path("unused"), with_pixels=False)


@needs_data
def test_nothing_that_is_measured_was_trained_on(corpus: data.Corpus) -> None:
    trained = set(corpus.train_images.tolist())
    for split in ("style", "concept", "title", "photo", "product"):
        assert data.list_images(corpus, split)
        assert not trained & set(data.list_images(corpus, split))
    assert not {corpus.source_of[i] for i in trained} & {data.HELD_VENDOR, data.SHOWN}
    for kind in ("emoji", "clipart"):
        drawn = [concept for concept in corpus.concepts if concept.kind == kind]
        held = [concept for concept in drawn if concept.held]
        assert 0.04 <= len(held) / len(drawn) <= 0.12
        assert not trained & {image for concept in held for image in concept.images}
    assert not set(corpus.glosses) & set(corpus.held_glosses)


@needs_data
def test_every_measured_row_has_one_right_answer_among_thirty(corpus: data.Corpus) -> None:
    for split, task in questions.MEASURED:
        drawn = {
            language: questions.draw_rows(corpus, split, task, language, 5, 0) for language in ("en", "zh")
        }
        assert drawn["en"], (split, task)
        for row in drawn["en"] + drawn["zh"]:
            assert len(row.candidates) == questions.CANDIDATES
            assert row.candidates[0] not in row.candidates[1:]


def test_a_caption_that_tells_neither_side_nor_ground_fits_its_siblings() -> None:
    scene = scenes.Scene(1, 2, 1, False, 0)
    turned, other = scenes.Scene(2, 1, 1, False, 0), scenes.Scene(1, 2, 1, False, 3)
    plain, told = scenes.Caption("a and b", False, False), scenes.Caption("a left of b on white", True, True)
    assert scenes.fits(plain, scene, turned) and scenes.fits(plain, scene, other)
    assert not scenes.fits(told, scene, turned) and not scenes.fits(told, scene, other)
    assert not scenes.fits(plain, scene, scenes.Scene(1, 5, 1, False, 0))
    assert not scenes.fits(plain, scenes.Scene(1, None, 2, False, 0), scenes.Scene(1, None, 3, False, 0))


def test_a_passage_holds_its_fact_and_a_question_speaks_of_it() -> None:
    rng = random.Random(0)
    fact = passages.define(("kumquat", "a small oval citrus fruit with thin sweet rind", "noun.food"))
    other = passages.define(("anvil", "a heavy block of iron", "noun.artifact"))
    for _ in range(20):
        passage = passages.compose_passage(fact, [other], rng)
        assert "umquat" in passage and fact.said[0] in passage and other.said[0] in passage
        words = passages.list_content_words(fact.ask(rng))
        assert words & (passages.list_content_words(fact.said[0]) | {"kumquat"})


def test_bm25_finds_the_text_that_shares_the_rarest_words() -> None:
    texts = ["the red apple", "the green tree", "the tree the tree"]
    scores = bm25.score_texts("a red tree", texts)
    assert scores.index(max(scores)) == 0
    assert bm25.score_texts("红苹果", ["苹果是红的", "绿色的树"])[1] == 0.0


def test_calibration_finds_the_factor_and_offset_that_scores_lack() -> None:
    generator = np.random.default_rng(0)
    true = generator.normal(-1, 2, (4000, 2))
    right = generator.random((4000, 2)) < 1 / (1 + np.exp(-true))
    rows = [
        [z[0] if r[0] else z[1], z[1] if r[0] else z[0]]
        for z, r in zip((true + 1) / 2, right, strict=True)
        if r[0] != r[1]
    ]
    factor, offset = calibration.fit(rows)
    calibrated = [[factor * z + offset for z in row] for row in rows]
    assert calibration.measure(calibrated).error < 0.03 < calibration.measure(rows).error


def test_folding_changes_every_margin_by_the_factor_and_nearly_the_offset() -> None:
    model, packer = evaluate.load_weights(DEMO_DIRECTORY), _read_packer()
    candidates = tuple(
        Entry(text) for text in ("red apple", "苹果", "a heavy block of iron", "steam locomotive")
    )
    packed = packer.pack(
        [Row(Entry(text), candidates, ()) for text in ("apple", "钟", "iron")], lambda _: (1, 1)
    )
    with torch.no_grad():
        before = score_rows(model, packed, torch.zeros(0), packer.answers)
        states = read_states(model, packed, torch.zeros(0)).flatten(0, 1)
        spread = calibration.fold(model, states, 0.5, -1.0, packer.answers)
        after = score_rows(model, packed, torch.zeros(0), packer.answers)
    assert spread < 0.2
    assert (after - (0.5 * before - 1.0)).abs().max() < 4 * spread + 0.01
    with pytest.raises(ValueError, match="fall with relevance"):
        calibration.fold(model, states, -0.1, 0.0, packer.answers)


def test_a_seed_repeats_the_views() -> None:
    cutout = torch.tensor([True, False] * 10)
    rgba = torch.randint(0, 255, (20, 32, 32, 4), dtype=torch.uint8)
    drawn = []
    for _ in range(2):
        generator = torch.Generator().manual_seed(7)
        changes, partner = views.draw_changes(cutout, ~cutout, 28, 56, generator, scenes=True)
        drawn.append((views.render_views(rgba, changes, 28, 56), partner))
    assert torch.equal(drawn[0][0], drawn[1][0]) and torch.equal(drawn[0][1], drawn[1][1])
    assert drawn[0][0].shape == (20, 3, 28, 56)
    assert float(drawn[0][0].min()) >= 0.0
    assert float(drawn[0][0].max()) <= 1.0


def test_muon_steps_as_torchs_own_in_fp32() -> None:
    torch.manual_seed(0)
    for shape in ((64, 192), (192, 64)):
        start, steps = torch.randn(shape), [torch.randn(shape) for _ in range(3)]
        moved = []
        for kind in (muon.Muon, functools.partial(torch.optim.Muon, adjust_lr_fn="match_rms_adamw")):
            weight = torch.nn.Parameter(start.clone())
            optimizer = kind([weight], lr=0.02, weight_decay=0.05)
            for gradient in steps:
                weight.grad = gradient.clone()
                optimizer.step()
            moved.append((weight - start).detach())
        assert float((moved[0] - moved[1]).norm() / moved[1].norm()) < 0.02, "torch's multiplies in bf16"
        sizes = torch.linalg.svdvals(muon.orthogonalise(steps[0]))
        assert float(sizes.min()) > 0.5 and float(sizes.max()) < 1.5


def test_a_random_order_is_what_the_card_says() -> None:
    gains = [evaluate.measure_rank([0.0] + [1.0] * above + [-1.0] * (29 - above)) for above in range(30)]
    assert math.isclose(sum(gain for gain, _ in gains) / 30, evaluate.RANDOM[0])
    assert math.isclose(sum(first for _, first in gains) / 30, evaluate.RANDOM[1])


def _read_packer() -> Packer:
    return Packer(Tokenizer.from_file(str(DEMO_DIRECTORY / "tokenizer.json")))
