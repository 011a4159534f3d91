"""The embedded demo model is small, safe to load, and clearly better than chance, in the service's own pipeline."""

from __future__ import annotations

import io
import json
import random
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from safetensors import safe_open
from tokenizers import Tokenizer

import models
from models import DEMO, Item, Job, Pixels, Reranker
from models.demo import data, evaluate, questions, tokenizer
from models.demo.model import Entry, Packer, Row, encode_images, score_rows
from models.demo.views import resize_images
from models.weights import DEMO_DIRECTORY

DATA = Path(__file__).parents[3] / "shared" / "data" / "train"
WHITE = (255, 255, 255)


@pytest.fixture(scope="module")
def reranker() -> Iterator[Reranker]:
    yield models.load(DEMO, device="cpu", threads=2)


def test_the_weights_are_small_and_bf16() -> None:
    assert sum(path.stat().st_size for path in DEMO_DIRECTORY.iterdir()) <= 25_000_000
    parameters = 0
    with safe_open(DEMO_DIRECTORY / "model.safetensors", "pt") as opened:
        for name in opened.keys():  # noqa: SIM118 - not a dict
            tensor = opened.get_slice(name)
            assert tensor.get_dtype() == "BF16"
            size = 1
            for side in tensor.get_shape():
                size *= side
            parameters += size
    assert 6_000_000 <= parameters <= 12_500_000


def test_the_tokenizer_has_the_answers_and_every_control_token() -> None:
    loaded = Tokenizer.from_file(str(DEMO_DIRECTORY / "tokenizer.json"))
    for word in ("yes", "no"):
        assert len(loaded.encode(word).ids) == 1
    state = json.loads(loaded.to_str())
    special = {token["content"]: token["special"] for token in state["added_tokens"]}
    assert special == dict.fromkeys(tokenizer.SPECIAL, True) | dict.fromkeys(tokenizer.ADDED, False)
    text = "A red apple, 一个红苹果, 🍎!"
    assert loaded.decode(loaded.encode(text).ids) == text


def test_no_file_tells_of_the_machine_that_made_it() -> None:
    for path in DEMO_DIRECTORY.glob("*.json"):
        text = path.read_text(encoding="utf-8")
        assert "_name_or_path" not in text
        if path.name != "tokenizer.json":  # whose vocabulary may well have words that begin so
            assert '"/' not in text, "no value is an absolute path"


@pytest.mark.parametrize(
    ("query", "texts"),
    [
        ("red apple", ["red apple", "steam locomotive", "crying face", "flag: Japan"]),
        ("dog", ["puppy, dog face, pet", "bank with a dollar sign", "rain cloud", "violin"]),
        ("苹果", ["red apple", "car", "umbrella", "house"]),
        ("umbrella", ["雨伞", "汽车", "狗", "钟"]),
        ("a fast way to travel", ["bullet train", "teapot", "mountain", "violin"]),
    ],
)
def test_texts_are_ordered_by_meaning(reranker: Reranker, query: str, texts: list[str]) -> None:
    margins = reranker.score(Job(Item(query), tuple(map(Item, texts)))).margins
    assert margins[0] == max(margins)
    assert margins[0] > max(margins[1:]) + 0.5


def test_drawn_images_are_ordered_by_what_they_show(reranker: Reranker) -> None:
    drawn = {
        "red circle": _draw_disc((221, 46, 68)),
        "green circle": _draw_disc((120, 177, 89)),
        "flag: France": _draw_flag(),
    }
    for name, image in drawn.items():
        candidates = (
            Item(image=image),
            *(Item(image=other) for other in drawn.values() if other is not image),
        )
        margins = reranker.score(Job(Item(name), candidates)).margins
        assert margins[0] == max(margins), name


@pytest.mark.skipif(not DATA.is_dir(), reason="the training data is not here: ../shared/data/train")
@pytest.mark.parametrize(("language", "least"), [("en", 0.5), ("zh", 0.45)])
def test_an_unseen_drawing_style_is_ranked_better_than_chance(
    reranker: Reranker, language: str, least: float
) -> None:
    corpus = data.load_corpus(DATA, Path("unused"), with_pixels=False)
    rows = questions.draw_rows(corpus, "style", "show", language, 30, 1)
    pictures = _read_pictures({e.image for row in rows for e in row.candidates if e.image is not None})
    gains = []
    for row in rows:
        candidates = tuple(Item(image=pictures[e.image]) for e in row.candidates if e.image is not None)
        gains.append(evaluate.measure_rank(reranker.score(Job(Item(row.query.text), candidates)).margins)[0])
    assert sum(gains) / len(gains) >= least


def test_training_scores_what_the_service_scores() -> None:
    """One row in the training's packed forward, and the same job in the service's, with texts and images; in fp32."""
    reranker = models.load(DEMO, device="cpu", dtype="fp32")
    pictures, texts = (
        [_draw_disc((221, 46, 68)), _draw_flag()],
        ["red circle", "一面旗", "a heavy block of iron"],
    )
    items = (*(Item(image=picture) for picture in pictures), *map(Item, texts))
    wanted = reranker.score(Job(Item("red circle"), items)).margins
    model = evaluate.load_weights(DEMO_DIRECTORY)
    packer = Packer(Tokenizer.from_file(str(DEMO_DIRECTORY / "tokenizer.json")))
    entries = (*(Entry(image=number) for number in range(len(pictures))), *map(Entry, texts))
    rgba = np.stack([_add_alpha(picture) for picture in pictures])
    packed = packer.pack([Row(Entry("red circle"), entries, ())], lambda _: (4, 4))
    with torch.no_grad():
        visual = encode_images(model, resize_images(rgba, 112, 112)).flatten(0, 1)
        margins = score_rows(model, packed, visual, packer.answers)[0]
    assert margins.tolist() == pytest.approx(wanted, abs=0.02)


def test_a_rank_is_measured_against_ties() -> None:
    assert evaluate.measure_rank([1.0, 0.0]) == (1.0, 1.0)
    assert evaluate.measure_rank([1.0, 1.0])[1] == 0.0
    assert evaluate.measure_rank([0.0, *range(1, 11)])[0] == 0.0


def test_keyword_pairs_and_captions_come_from_the_concept() -> None:
    concept = data.Concept(
        "1f34e", "emoji", "food & drink", ["red apple"], ["红苹果"], ["fruit", "red"], ["水果"]
    )
    rng = random.Random(0)
    for _ in range(50):
        caption = data.pick_caption(concept, rng, zh=0.0).lower()
        assert any(word in caption for word in ("apple", "fruit", "red"))


def _read_pictures(images: set[int]) -> dict[int, Pixels]:
    records = data.read_lines(DATA / "image_text.jsonl.gz")
    pictures = {}
    with zipfile.ZipFile(DATA / "emoji.zip") as archive:
        for index in images:
            with Image.open(io.BytesIO(archive.read(records[index]["image"]))) as opened:
                ground = Image.new("RGBA", opened.size, WHITE)
                ground.alpha_composite(opened.convert("RGBA"))
            pictures[index] = _to_pixels(ground)
    return pictures


def _add_alpha(pixels: Pixels) -> NDArray[np.uint8]:
    rgb = np.frombuffer(pixels.data, np.uint8).reshape(pixels.height, pixels.width, 3)
    return np.concatenate([rgb, np.full_like(rgb[..., :1], 255)], -1)


def _draw_disc(colour: tuple[int, int, int]) -> Pixels:
    image = Image.new("RGB", (112, 112), WHITE)
    ImageDraw.Draw(image).ellipse((5, 5, 107, 107), fill=colour)
    return _to_pixels(image)


def _draw_flag() -> Pixels:
    image = Image.new("RGB", (112, 112), WHITE)
    for place, colour in enumerate(((37, 80, 152), (238, 238, 238), (225, 39, 61))):
        ImageDraw.Draw(image).rectangle((4 + 35 * place, 21, 38 + 35 * place, 91), fill=colour)
    return _to_pixels(image)


def _to_pixels(image: Image.Image) -> Pixels:
    flat = image.convert("RGB")
    return Pixels(flat.width, flat.height, flat.tobytes())
