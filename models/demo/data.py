"""The training data in memory: images as fixed arrays, captions by concept, text pairs, splits, augmentation.

Sources and licences: NOTICE beside this file. Every image is kept as uint8 RGBA at 128 x 128 (photos are stretched,
their alpha is 255): 1.8 GB, decoded once and mapped from disk afterwards.
"""

from __future__ import annotations

import gzip
import io
import json
import random
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional

SIDE = 128
HELD_VENDOR = "fxemoji"
HELD_SHARE = 0.05
PHOTOS = frozenset({"caltech101", "clothing", "grocery", "grocery-iconic"})
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
# How people ask for a picture: of a drawing, of a photo, in Chinese.
PHRASES_EN = (
    (
        "{} emoji",
        "an emoji of {}",
        "a drawing of {}",
        "icon of {}",
        "a picture of {}",
        "{} symbol",
        "show me {}",
    ),
    (
        "photo of {}",
        "a picture of {}",
        "{} photo",
        "show me {}",
        "an image with {}",
        "there is {} in the picture",
    ),
)
PHRASES_ZH = ("{}的图片", "一张{}的图片", "{}的照片", "{}表情", "画着{}的图", "图中有{}")


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
    emoji = sorted((c for c in listed if c.kind == "emoji"), key=lambda c: c.name)
    for concept in random.Random(7).sample(emoji, round(len(emoji) * HELD_SHARE)):
        concept.held = True
    sources = [record["source"] for record in records]
    train = [i for i in range(len(records)) if sources[i] != HELD_VENDOR and not listed[concept_of[i]].held]
    texts = read_lines(folder / "text_text.jsonl.gz")
    glosses = [(t["a"], t["b"], t["group"]) for t in texts if t["source"].startswith("wordnet")]
    pairs = [(t["a"], t["b"]) for t in texts if not t["source"].startswith("wordnet")]
    pixels = (
        _load_pixels(folder, cache, [r["image"] for r in records])
        if with_pixels
        else np.zeros((0, 1, 1, 4), np.uint8)
    )
    return Corpus(listed, np.array(concept_of), sources, np.array(train), pixels, glosses, pairs)


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
    for word, gloss, _ in corpus.glosses:
        texts += [word, gloss]
    return texts


def pick_caption(concept: Concept, rng: random.Random, *, zh: float = 0.4) -> str:
    """A random text of a concept: its name, name and keywords, or keywords alone, in one language."""
    chinese = bool(concept.zh) and rng.random() < zh
    names = concept.zh if chinese else concept.en
    keywords = concept.keywords_zh if chinese else concept.keywords_en
    roll = rng.random()
    if not keywords or roll < 0.55:
        if concept.descriptions and not chinese and roll < 0.1:
            return rng.choice(concept.descriptions)
        text = rng.choice(names)
        if concept.kind == "photo" and rng.random() < 0.5:
            text = text.removeprefix("a photo of ").removeprefix("a product shot of ")
    else:
        chosen = rng.sample(keywords, min(len(keywords), rng.randint(2, 6)))
        if roll < 0.8:
            chosen.insert(0, rng.choice(names))
        text = ("、" if chinese else rng.choice((", ", " "))).join(chosen)
    if rng.random() < 0.12:
        text = rng.choice(PHRASES_ZH if chinese else PHRASES_EN[concept.kind == "photo"]).format(text)
    return vary_case(text, rng)


def vary_case(text: str, rng: random.Random) -> str:
    """Callers write names in many ways: sometimes capitalised, sometimes behind a space."""
    roll = rng.random()
    if roll < 0.10:
        text = text.capitalize()
    elif roll < 0.13:
        text = text.title()
    return text


def resize_images(pixels: NDArray[np.uint8], height: int, width: int) -> Tensor:
    """[images, SIDE, SIDE, 4] -> normalised RGB on white, [images, 3, height, width], bicubic with antialiasing."""
    rgba = torch.from_numpy(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2).float() / 255
    rgb = rgba[:, :3] * rgba[:, 3:] + (1 - rgba[:, 3:])
    rgb = functional.interpolate(rgb, (height, width), mode="bicubic", antialias=True).clamp(0, 1)
    return normalise(rgb)


def normalise(rgb: Tensor) -> Tensor:
    """RGB in 0..1 -> what the vision tower reads, [images, 3, height, width]."""
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))
    return (rgb - mean) / std


def augment_images(
    corpus: Corpus, images: NDArray[np.int64], height: int, width: int, gen: torch.Generator
) -> Tensor:
    """Random views of `images`: another ground, place, size, turn, colour. [images, 3, height, width], normalised.

    Strong on purpose: the model must know a thing in a drawing style that it never saw.
    """
    count = len(images)
    rgba = torch.from_numpy(corpus.pixels[images]).permute(0, 3, 1, 2).float() / 255
    if max(height, width) <= 64:
        rgba = functional.avg_pool2d(rgba, 2)
    cutout = torch.tensor([corpus.source_of[i] not in PHOTOS for i in images])
    symbolic = torch.tensor(
        [corpus.concepts[corpus.concept_of[i]].group in ("symbols", "flags") for i in images]
    )

    def draw(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(count, *shape, generator=gen) * (high - low) + low

    def chance(probability: float) -> Tensor:
        return torch.rand(count, generator=gen) < probability

    # where: an affine map from the output to the source, in [-1, 1]; alpha is 0 outside a cut-out
    zoom = torch.where(cutout, draw(0.85, 1.45), draw(0.6, 1.0))
    squeeze = torch.exp(draw(-0.15, 0.15))
    angle = draw(-0.26, 0.26) * chance(0.5)
    flip = torch.where(chance(0.5) & ~(cutout & symbolic), -1.0, 1.0)
    slack = (zoom - 1).abs()
    cos, sin = torch.cos(angle) * zoom, torch.sin(angle) * zoom
    theta = torch.stack(
        [
            torch.stack([cos * squeeze * flip, -sin, draw(-1, 1) * slack], -1),
            torch.stack([sin * flip, cos / squeeze, draw(-1, 1) * slack], -1),
        ],
        1,
    )  # [images, 2, 3]
    if height != width:  # a cut-out keeps its shape on a wide or tall canvas
        longest = max(height, width)
        stretch = torch.tensor([width / longest, height / longest])
        keep = torch.where(cutout[:, None], stretch, torch.ones(2)) * torch.where(
            cutout[:, None], longest / min(height, width), 1.0
        )
        theta[:, :, :2] = theta[:, :, :2] * keep[:, None, :]
    grid = functional.affine_grid(theta, [count, 4, height, width], align_corners=False)
    rgba[:, :3] *= rgba[:, 3:]
    view = functional.grid_sample(rgba, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    alpha = view[:, 3:]
    rgb = view[:, :3]

    # colour: near-identity 3 x 3 mixing, brightness, contrast, gray, inverted
    straight = rgb / alpha.clamp_min(1e-3)
    mix = torch.eye(3) + draw(-0.15, 0.15, 3, 3) * chance(0.7)[:, None, None]
    mix = torch.where(chance(0.12)[:, None, None], torch.full((3, 3), 1 / 3), mix)
    straight = torch.einsum("bij,bjhw->bihw", mix, straight)
    gain, lift, gamma = (
        draw(0.7, 1.3, 1, 1, 1),
        draw(-0.12, 0.12, 1, 1, 1),
        torch.exp(draw(-0.35, 0.35, 1, 1, 1)),
    )
    straight = ((straight - 0.5) * gain + 0.5 + lift).clamp(1e-3, 1) ** gamma
    straight = torch.where(chance(0.03)[:, None, None, None], 1 - straight, straight)

    # ground: mostly white or a light colour, sometimes any colour, a gradient, or another image of the batch
    ground = torch.ones(count, 3, 1, 1) * draw(0.9, 1.0, 1, 1, 1)
    ground = torch.where(chance(0.5)[:, None, None, None], draw(0.0, 1.0, 3, 1, 1), ground).expand(
        -1, -1, height, width
    )
    ramp = torch.linspace(0, 1, height).view(1, 1, -1, 1) * draw(0, 1, 3, 1, 1) + torch.linspace(
        0, 1, width
    ) * draw(0, 1, 3, 1, 1)
    ground = torch.where(chance(0.15)[:, None, None, None], ramp / 2, ground)
    pictures = torch.nonzero(~cutout).flatten()
    if len(pictures):
        other = pictures[torch.randint(len(pictures), (count,), generator=gen)]
        ground = torch.where((chance(0.12) & cutout)[:, None, None, None], rgb[other], ground)
    out = straight * alpha + ground * (1 - alpha)

    soft = functional.avg_pool2d(functional.pad(out, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    out = torch.where(chance(0.12)[:, None, None, None], soft, out)
    edges = (1 - 6 * (out - soft).abs().mean(1, keepdim=True)).clamp(0, 1).expand(-1, 3, -1, -1)
    out = torch.where(chance(0.03)[:, None, None, None], edges, out)
    out = (
        out
        + torch.randn(out.shape, generator=gen) * draw(0, 0.04, 1, 1, 1) * chance(0.3)[:, None, None, None]
    )
    # a hidden rectangle now and then, so that no single part decides
    top, left = draw(0, 1), draw(0, 1)
    size = draw(0.15, 0.4)
    rows, columns = torch.linspace(0, 1, height), torch.linspace(0, 1, width)
    inside = ((rows >= top[:, None]) & (rows < (top + size)[:, None]))[:, None, :, None] & (
        (columns >= left[:, None]) & (columns < (left + size)[:, None])
    )[:, None, None, :]
    out = torch.where(inside & chance(0.2)[:, None, None, None], draw(0, 1, 3, 1, 1), out)
    return normalise(out.clamp(0, 1))


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
    mapped: NDArray[np.uint8] = np.load(path)
    return mapped


def _square(image: Image.Image) -> NDArray[np.uint8]:
    """Cut-outs are padded to a square, photos are stretched to one."""
    if image.mode != "RGBA":
        return np.asarray(image.convert("RGBA").resize((SIDE, SIDE), Image.Resampling.BICUBIC))
    side = max(image.size)
    canvas = Image.new("RGBA", (side, side))
    canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return np.asarray(canvas.resize((SIDE, SIDE), Image.Resampling.BICUBIC))
