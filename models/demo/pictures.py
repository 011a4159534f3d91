"""Two pictures of the model card: ten rankings of held-out images, and the reliability of the scores.

Only images whose licence lets them be shown here are drawn: FxEmoji (Apache-2.0), openclipart (public domain) and the
clothing dataset (CC0). NOTICE names them.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from models.demo.calibration import Reliability
from models.demo.data import Corpus, list_images
from models.demo.model import Entry, Row
from models.demo.questions import CANDIDATES, draw_rows, list_names

SHOWN = (("style", 6), ("title", 2), ("photo", 2))  # splits, and how many queries of each
SIDE, GAP, LABEL = 96, 8, 190  # pixels
INK, PAPER, RIGHT = (30, 30, 30), (255, 255, 255), (20, 140, 60)
Score = Callable[[Sequence[Row]], list[list[float]]]


def draw_rankings(corpus: Corpus, score: Score, folder: Path) -> None:
    """Ten queries drawn by chance, each with its best five of 30 images and their scores; the right one is framed."""
    rows = _draw_shown(corpus)
    height, width = len(rows) * (SIDE + 3 * GAP) + GAP, LABEL + 5 * (SIDE + GAP) + GAP
    canvas = Image.new("RGB", (width, height), PAPER)
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(14)
    for place, (row, margins) in enumerate(zip(rows, score(rows), strict=True)):
        top = GAP + place * (SIDE + 3 * GAP)
        for line, words in enumerate(_wrap(row.query.text, 24)):
            pen.text((GAP, top + 18 + 18 * line), words, INK, font)
        best = sorted(range(len(margins)), key=lambda at: -margins[at])
        pen.text(
            (GAP, top + SIDE - 18), f"right one: rank {best.index(0) + 1}", INK, ImageFont.load_default(11)
        )
        for column, at in enumerate(best[:5]):
            left, image = LABEL + column * (SIDE + GAP), row.candidates[at].image
            if image is None:
                raise ValueError("a picture shows images only")
            shown = Image.fromarray(corpus.pixels[image])
            ground = Image.new("RGBA", shown.size, (*PAPER, 255))
            ground.alpha_composite(shown)
            canvas.paste(ground.convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS), (left, top))
            if at == 0:
                pen.rectangle((left - 2, top - 2, left + SIDE + 1, top + SIDE + 1), outline=RIGHT, width=3)
            likely = 1 / (1 + math.exp(-margins[at]))
            pen.text(
                (left, top + SIDE + 2), f"{likely:.3f}", RIGHT if at == 0 else INK, ImageFont.load_default(11)
            )
    canvas.quantize(192).save(folder / "rankings.png", optimize=True)


def draw_reliability(reliability: Reliability, folder: Path) -> None:
    """How often candidates of a score were right: all of them (dots), and the first of each list (rings)."""
    side, edge = 320, 44
    canvas = Image.new("RGB", (side + 2 * edge, side + 2 * edge), PAPER)
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(12)

    def place(x: float, y: float) -> tuple[float, float]:
        return edge + x * side, edge + (1 - y) * side

    pen.rectangle((*place(0, 1), *place(1, 0)), outline=INK)
    pen.line((*place(0, 0), *place(1, 1)), (190, 190, 190), 1)
    for tick in np.linspace(0, 1, 6):
        x, y = place(float(tick), 0)
        pen.text((x - 8, y + 4), f"{tick:.1f}", INK, font)
        x, y = place(0, float(tick))
        pen.text((x - 26, y - 7), f"{tick:.1f}", INK, font)
    pen.text((edge + side / 2 - 20, 2 * edge + side - 22), "score", INK, font)
    pen.text((edge, edge - 22), "share that is right: all candidates (dots), the first (rings)", INK, font)
    for bins, filled in ((reliability.bins, True), (reliability.firsts, False)):
        for score, right, count in bins:
            x, y = place(score, right)
            size = 2 + math.log10(count + 1) * 2
            pen.ellipse((x - size, y - size, x + size, y + size), fill=RIGHT if filled else None, outline=INK)
    canvas.quantize(32).save(folder / "reliability.png", optimize=True)


def _draw_shown(corpus: Corpus) -> list[Row]:
    """English queries (the font has no Chinese), drawn by chance."""
    rows: list[Row] = []
    for split, count in SHOWN:
        if split == "photo":
            rows += _draw_clothes(corpus, count)
        else:
            rows += draw_rows(corpus, split, "show", "en", count, seed=11)
    return rows


def _draw_clothes(corpus: Corpus, count: int) -> list[Row]:
    """A kind of clothing among thirty held-out photos; photos of the kind itself are right only once."""
    rng = random.Random(11)
    clothes = [i for i in list_images(corpus, "photo") if corpus.source_of[i] == "clothing"]
    rows = []
    for image in rng.sample(clothes, count):
        others = [i for i in clothes if corpus.concept_of[i] != corpus.concept_of[image]]
        shown = [image, *rng.sample(others, CANDIDATES - 1)]
        name = list_names(corpus, image, "en")[0].removeprefix("a photo of ")
        rows.append(Row(Entry(name), tuple(Entry(image=i) for i in shown), ()))
    return rows


def _wrap(text: str, most: int) -> list[str]:
    lines = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + len(word) >= most:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines[:4]
