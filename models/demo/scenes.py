"""Composed pictures: two to four cut-outs on a colour or a photo, with made captions in both languages.

A family is one scene and three that differ from it in one respect each - how many, which side, which ground, which
thing - so that its captions are hard to tell apart for whoever only recognises the things.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from models.demo.data import Concept, Corpus

SIDE = 112
NUMBERS = ((1, "a", "一个"), (2, "two", "两个"), (3, "three", "三个"), (4, "four", "四个"))
GROUNDS = (
    ("white", "白色", (255, 255, 255)), ("black", "黑色", (20, 20, 20)), ("red", "红色", (215, 40, 45)),
    ("green", "绿色", (70, 165, 75)), ("blue", "蓝色", (50, 95, 205)), ("yellow", "黄色", (245, 215, 65)),
    ("pink", "粉色", (245, 165, 195)), ("grey", "灰色", (150, 150, 150)),
)  # fmt: skip
GROUPS = frozenset({"animals & nature", "food & drink", "objects", "travel & places", "activities"})


@dataclass(frozen=True, slots=True)
class Scene:
    """Which images stand where. `ground` is a number in GROUNDS, or an image of a photo, as -1 - image."""

    first: int
    second: int | None  # beside the first, or below it; without it the first stands there `count` times
    count: int
    upright: bool
    ground: int


@dataclass(frozen=True, slots=True)
class Caption:
    """A text, and whether it tells the side and the ground."""

    text: str
    sided: bool
    grounded: bool


def list_things(corpus: Corpus, images: Sequence[int]) -> list[int]:
    """Those of `images` that show a thing with a plain name in both languages."""
    return [i for i in images if _is_thing(corpus.concepts[corpus.concept_of[i]])]


def draw_family(
    corpus: Corpus, things: Sequence[int], photos: Sequence[int], rng: random.Random
) -> list[Scene]:
    """A scene and three that differ from it in one respect."""
    first, second, third = (rng.choice(things) for _ in range(3))
    while len({int(corpus.concept_of[i]) for i in (first, second, third)}) < 3:
        first, second, third = (rng.choice(things) for _ in range(3))
    ground, other = rng.sample(range(len(GROUNDS)), 2)
    if rng.random() < 0.25:
        ground = -1 - rng.choice(photos)
    if rng.random() < 0.5:
        counts = rng.sample((1, 2, 3, 4), 2)
        scene = Scene(first, None, counts[0], False, ground)
        return [
            scene,
            replace(scene, count=counts[1]),
            replace(scene, ground=other),
            replace(scene, first=second),
        ]
    scene = Scene(first, second, 1, rng.random() < 0.4, ground)
    turned = replace(scene, first=second, second=first)
    return [scene, turned, replace(scene, ground=other), replace(scene, second=third)]


def caption_scene(corpus: Corpus, scene: Scene, rng: random.Random, *, chinese: bool) -> Caption:
    """What a scene shows, in one language; side and ground are told now and then."""
    sided = scene.second is not None and rng.random() < 0.6
    grounded = scene.ground >= 0 and rng.random() < 0.6
    name, number = _name(corpus, scene.first, chinese=chinese), NUMBERS[scene.count - 1]
    if scene.second is None:
        text = f"{number[2]}{name}" if chinese else f"{number[1]} {_count_many(name)}"
        if scene.count == 1 and not chinese:
            text = _add_article(name)
    else:
        other = _name(corpus, scene.second, chinese=chinese)
        if chinese:
            side = "上面" if scene.upright else "左边"
            text = f"{name}在{other}的{side}" if sided else f"{name}和{other}"
        else:
            side = "above" if scene.upright else "left of"
            text = f"{_add_article(name)} {side if sided else 'and'} {_add_article(other)}"
    if grounded:
        colour = GROUNDS[scene.ground]
        text = f"{colour[1]}背景上的{text}" if chinese else f"{text} on a {colour[0]} background"
    return Caption(text, sided, grounded)


def fits(caption: Caption, scene: Scene, other: Scene) -> bool:
    """Whether a caption of `scene` is true of `other` as well."""
    if {scene.first, scene.second} != {other.first, other.second} or scene.count != other.count:
        return False
    turned = scene.first != other.first or scene.upright != other.upright
    return not (caption.sided and turned) and not (caption.grounded and scene.ground != other.ground)


def paint_scene(corpus: Corpus, scene: Scene) -> NDArray[np.uint8]:
    """The scene's pixels, RGBA, [112, 112, 4]."""
    if scene.ground >= 0:
        canvas = Image.new("RGBA", (SIDE, SIDE), (*GROUNDS[scene.ground][2], 255))
    else:
        canvas = Image.fromarray(corpus.pixels[-1 - scene.ground]).resize((SIDE, SIDE))
    half = SIDE // 2
    corners = ((0, 0), (half, half), (half, 0), (0, half))[: scene.count]
    images, size = [scene.first] * scene.count, half
    if scene.second is not None:
        images = [scene.first, scene.second]
        corners = (
            ((half // 2, 0), (half // 2, half)) if scene.upright else ((0, half // 2), (half, half // 2))
        )
    elif scene.count == 1:
        corners, size = ((half // 4, half // 4),), SIDE * 3 // 4
    for image, corner in zip(images, corners, strict=True):
        thing = Image.fromarray(corpus.pixels[image]).resize((size, size), Image.Resampling.BICUBIC)
        canvas.alpha_composite(thing, corner)
    return np.asarray(canvas)


def _is_thing(concept: Concept) -> bool:
    return (
        concept.kind == "emoji" and concept.group in GROUPS and bool(concept.zh) and ":" not in concept.en[0]
    )


def _name(corpus: Corpus, image: int, *, chinese: bool) -> str:
    concept: Concept = corpus.concepts[corpus.concept_of[image]]
    return concept.zh[0] if chinese else concept.en[0]


def _add_article(name: str) -> str:
    return name if name.endswith("s") else f"an {name}" if name[0] in "aeio" else f"a {name}"


def _count_many(name: str) -> str:
    if name.endswith(("s", "x", "ch", "sh")):
        return name if name.endswith("s") else name + "es"
    return name[:-1] + "ies" if name.endswith("y") and name[-2:-1] not in "aeiou" else name + "s"
