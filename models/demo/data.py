"""The training data in memory: images as fixed arrays, captions by concept, text pairs, and what is held out.

Sources and licences: NOTICE beside this file. Every image is kept as uint8 RGBA at 128 x 128 (photos are stretched,
their alpha is 255): 1.8 GB, decoded once and mapped from disk afterwards.
"""

from __future__ import annotations

import gzip
import io
import json
import random
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SIDE = 128
HELD_VENDOR = "fxemoji"
HELD_CONCEPTS = (("emoji", 0.05), ("clipart", 0.08))
HELD_PHOTOS, HELD_GLOSSES = 0.10, 0.03
SHOWN = "grocery-iconic"  # product shots with a written description: neither is trained on
PHOTOS = frozenset({"caltech101", "clothing", "grocery", "grocery-iconic"})
SPLITS = ("style", "concept", "title", "photo", "product", "seen", "seen photo")
# How people ask for a picture: of a drawing, of a photo, in Chinese.
PHRASES_EN = (
    ("{} emoji", "an emoji of {}", "a drawing of {}", "icon of {}", "a picture of {}", "{} symbol", "show me {}",
     "this is {}", "a {}", "the {}", "an illustration of a {}", "a {} on a white background", "{}."),
    ("photo of {}", "a picture of {}", "{} photo", "show me {}", "an image with {}", "there is {} in the picture",
     "this is a {}", "a {}", "the {}", "a close-up of {}", "a {} on a white background", "{}."),
)  # fmt: skip
PHRASES_ZH = (
    "{}的图片",
    "一张{}的图片",
    "{}的照片",
    "{}表情",
    "画着{}的图",
    "图中有{}",
    "这是{}",
    "一个{}",
    "{}。",
)


@dataclass(slots=True)
class Concept:
    """What several images show, and every text that names it."""

    name: str
    kind: str  # emoji, photo or clipart
    group: str
    en: list[str] = field(default_factory=list)
    zh: list[str] = field(default_factory=list)
    keywords_en: list[str] = field(default_factory=list)
    keywords_zh: list[str] = field(default_factory=list)
    descriptions: list[str] = field(default_factory=list)
    images: list[int] = field(default_factory=list)
    held: bool = False


@dataclass(slots=True)
class Corpus:
    """Everything that is trained or validated on. `concept_of[i]` and `source_of[i]` belong to image i."""

    concepts: list[Concept]
    concept_of: NDArray[np.int64]
    source_of: list[str]
    train_images: NDArray[np.int64]
    pixels: NDArray[np.uint8]  # [images, SIDE, SIDE, 4]
    glosses: list[tuple[str, str, str]]  # word, gloss, group
    held_glosses: list[tuple[str, str, str]]
    pairs: list[tuple[str, str]]  # name and keywords, Chinese and English


def load_corpus(folder: Path, cache: Path, *, with_pixels: bool = True) -> Corpus:
    """Read the captions and decode the images (once; then mapped from `cache`)."""
    records = read_lines(folder / "image_text.jsonl.gz")
    concepts: dict[str, Concept] = {}
    concept_of: list[int] = []
    order: dict[str, int] = {}
    for index, record in enumerate(records):
        source = record["source"]
        kind = "photo" if source in PHOTOS else "clipart" if source.startswith("openclipart") else "emoji"
        name = record["en"][0].strip().lower() if kind == "clipart" else record["concept"]
        key = f"{kind}/{name}"
        if key not in concepts:
            order[key] = len(order)
            concepts[key] = Concept(name, kind, record.get("group") or "")
        concept = concepts[key]
        _extend(concept.en, record["en"])
        _extend(concept.zh, record.get("zh", []) + record.get("zh_hant", []))
        _extend(concept.keywords_en, record.get("kw_en", []))
        _extend(concept.keywords_zh, record.get("kw_zh", []))
        _extend(concept.descriptions, [record["desc_en"]] if record.get("desc_en") else [])
        concept.images.append(index)
        concept_of.append(order[key])
    listed = list(concepts.values())
    _hold_concepts(listed)
    sources = [record["source"] for record in records]
    held = np.array(
        [_is_held(record["image"], source) for record, source in zip(records, sources, strict=True)]
    )
    train = [i for i in range(len(records)) if not held[i] and not listed[concept_of[i]].held]
    texts = read_lines(folder / "text_text.jsonl.gz")
    defined = [(t["a"], t["b"], t["group"]) for t in texts if t["source"].startswith("wordnet")]
    glosses = [one for one in defined if not _falls(one[0], HELD_GLOSSES)]
    held_glosses = [one for one in defined if _falls(one[0], HELD_GLOSSES)]
    pairs = [(t["a"], t["b"]) for t in texts if not t["source"].startswith("wordnet")]
    pixels = (
        _load_pixels(folder, cache, [r["image"] for r in records])
        if with_pixels
        else np.zeros((0, 1, 1, 4), np.uint8)
    )
    return Corpus(
        listed, np.array(concept_of), sources, np.array(train), pixels, glosses, held_glosses, pairs
    )


def list_images(corpus: Corpus, split: str) -> list[int]:
    """Images of a split: four that were held out, and two of drawings and photos that were trained on.

    style: a vendor no image of which was trained on. concept: emoji of two vendors, title: clip art, whose concepts
    were not trained on in any style. photo: photos of trained classes. product: product shots, on white.
    """
    concepts, trained = corpus.concepts, set(corpus.train_images.tolist())

    def belongs(i: int) -> bool:
        source: str = corpus.source_of[i]
        concept: Concept = concepts[corpus.concept_of[i]]
        if split == "style":
            return source == HELD_VENDOR and not concept.held
        if split == "concept":
            return source in ("twemoji", "noto") and concept.held
        if split == "title":
            return concept.kind == "clipart" and concept.held
        if split == "photo":
            return concept.kind == "photo" and i not in trained and source != SHOWN
        if split == "product":
            return source == SHOWN
        if split == "seen":
            return i in trained and source == "twemoji"
        return i in trained and concept.kind == "photo"

    if split not in SPLITS:
        raise ValueError(f"no such split: {split}")
    return [i for i in range(len(corpus.concept_of)) if belongs(i)]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a .jsonl.gz file."""
    with gzip.open(path, "rt", encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


def list_texts(corpus: Corpus) -> list[str]:
    """What the tokenizer learns from; names and keywords count more often than glosses."""
    texts: list[str] = []
    for concept in corpus.concepts:
        weight = 6 if concept.kind != "clipart" else 2
        for text in concept.en + concept.keywords_en + concept.zh + concept.keywords_zh:
            texts += [text, " " + text] * weight
        texts += concept.descriptions
    for word, gloss, _ in corpus.glosses + corpus.held_glosses:
        texts += [word, gloss]
    return texts


def pick_caption(concept: Concept, rng: random.Random, *, zh: float = 0.4) -> str:
    """A random text of a concept: its name, name and keywords, or keywords alone, in one language."""
    chinese = bool(concept.zh) and rng.random() < zh
    names = concept.zh if chinese else concept.en
    keywords = concept.keywords_zh if chinese else concept.keywords_en
    roll = rng.random()
    if not keywords or roll < 0.55:
        text = rng.choice(names)
        if concept.kind == "photo" and rng.random() < 0.5:
            text = text.removeprefix("a photo of ").removeprefix("a product shot of ")
    else:
        chosen = rng.sample(keywords, min(len(keywords), rng.randint(2, 6)))
        if roll < 0.8:
            chosen.insert(0, rng.choice(names))
        text = ("、" if chinese else rng.choice((", ", " "))).join(chosen)
    if rng.random() < 0.2:
        text = rng.choice(PHRASES_ZH if chinese else PHRASES_EN[concept.kind == "photo"]).format(text)
    return vary_case(text, rng)


def shorten_name(name: str) -> str:
    """A name without case, article and "photo of": what two concepts must share to be the same thing."""
    words = name.lower().removeprefix("a photo of ").removeprefix("a product shot of ")
    return words.removeprefix("a ").removeprefix("an ").removeprefix("the ")


def vary_case(text: str, rng: random.Random) -> str:
    """Callers write names in many ways: sometimes capitalised, sometimes behind a space."""
    roll = rng.random()
    if roll < 0.10:
        text = text.capitalize()
    elif roll < 0.13:
        text = text.title()
    return text


def _hold_concepts(concepts: list[Concept]) -> None:
    """Hold a share of the emoji and of the clip art; clip art that has a held emoji's name goes with it."""
    drawn = random.Random(7)
    for kind, share in HELD_CONCEPTS:
        mine = sorted((c for c in concepts if c.kind == kind), key=lambda c: c.name)
        for concept in drawn.sample(mine, round(len(mine) * share)):
            concept.held = True
    names = {name.lower() for c in concepts if c.held and c.kind == "emoji" for name in c.en}
    for concept in concepts:
        concept.held |= concept.kind == "clipart" and any(name.lower() in names for name in concept.en)


def _is_held(image: str, source: str) -> bool:
    """Whether an image is held out for itself: the vendor, the product shots, one photo in ten by its file's name."""
    return source in (HELD_VENDOR, SHOWN) or (source in PHOTOS and _falls(image, HELD_PHOTOS))


def _falls(name: str, share: float) -> bool:
    """Whether a name is among a fixed `share` of all names, whatever others there are."""
    return zlib.crc32(name.encode()) / 2**32 < share


def _extend(known: list[str], new: list[str]) -> None:
    known += [text.strip() for text in new if text and text.strip() and text.strip() not in known]


def _load_pixels(folder: Path, cache: Path, names: list[str]) -> NDArray[np.uint8]:
    path = cache / "pixels.npy"
    if not path.exists():
        archives = [zipfile.ZipFile(folder / f"{name}.zip") for name in ("emoji", "clipart", "photos")]
        where = {name: archive for archive in archives for name in archive.namelist()}
        array = np.zeros((len(names), SIDE, SIDE, 4), np.uint8)
        for index, name in enumerate(names):
            with Image.open(io.BytesIO(where[name].read(name))) as image:
                array[index] = _square(image)
        cache.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial.npy")
        np.save(partial, array)
        partial.replace(path)
    mapped: NDArray[np.uint8] = np.load(path, mmap_mode="r")
    return mapped


def _square(image: Image.Image) -> NDArray[np.uint8]:
    """Cut-outs are padded to a square, photos are stretched to one."""
    if image.mode != "RGBA":
        return np.asarray(image.convert("RGBA").resize((SIDE, SIDE), Image.Resampling.BICUBIC))
    side = max(image.size)
    canvas = Image.new("RGBA", (side, side))
    canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return np.asarray(canvas.resize((SIDE, SIDE), Image.Resampling.BICUBIC))
