"""The image half of `bench/screening.py`: what looking at an image costs, and how often it cries wolf.

stages      milliseconds of one core for one image of 1024 × 1024, stage by stage: time that others took is not in it
rate        images a second through real locked children on two cores, decoding alone and with both networks
alarms      with --photos: how many harmless pictures of a zip score 0.3, 0.6, 0.8, by its folders
tones       scores of plain planes in the ten tones of the Monk scale, lit a little unevenly
"""

from __future__ import annotations

import asyncio
import io
import random
import statistics
import time
import zipfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from service.screening import ImageLimits, nets, skin
from service.screening.framing import unframe
from service.screening.image_risk import Sight
from service.screening.messages import Equipment
from service.screening.ocr import TextReader, has_edges
from service.screening.pixels import clean_image
from service.screening.pool import Screen
from service.screening.signals import Findings, Looks
from tenants.risk import Category

SIDE = 1024
FITTING_SIDE = 980
"""The largest square that reaches the model as it is: larger ones pass through the reference's two bicubic resizes."""
LIMITS = ImageLimits(bytes=16 * 2**20, pixels=40_000_000, side=16_384, aspect=200, frames=1)
CHILDREN = 2
AIM_IMAGES_S = 25.0
THRESHOLDS = (0.3, 0.6, 0.8)
MONK = ("f6ede4", "f3e7db", "f7ead0", "eadaba", "d7bd96", "a07e56", "825c43", "604134", "3a312a", "292420")
"""Monk Skin Tone scale, light to dark (skintone.google)."""

Photo = tuple[str, Image.Image]


def measure_image(photos: Path | None, *, quick: bool) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Figures and aims."""
    sight = Sight()
    sight.warm_up()
    samples = (
        list(_photos(photos, 24 if quick else 96))
        if photos
        else [("drawn", _drawn(seed)) for seed in range(24)]
    )
    encoded, fitting = (
        [_jpeg(image.resize((side, side), Image.Resampling.BICUBIC)) for _, image in samples]
        for side in (SIDE, FITTING_SIDE)
    )
    rates = asyncio.run(_rates({SIDE: encoded, FITTING_SIDE: fitting}, seconds=12.0 if quick else 40.0))
    figures: list[dict[str, Any]] = [
        {
            "what": "stages",
            "pictures": "photos" if photos else "drawn",
            "p50_cpu_ms": _stages(sight, encoded[:12]),
        },
        {
            "what": "rate",
            "pictures": "photos" if photos else "drawn",
            "children": CHILDREN,
            "images_s": rates,
        },
        {"what": "tones", "scores": _tones(sight)},
    ]
    if photos and not quick:
        figures += [{"what": "alarms", **alarms} for alarms in _alarms(sight, photos)]
    measured = rates[f"networks, {SIDE}"]
    aim = {
        "what": f"images a second, {SIDE} × {SIDE}, both networks, {CHILDREN} children",
        "aim": AIM_IMAGES_S,
        "measured": measured,
        "ok": measured >= AIM_IMAGES_S,
    }
    return figures, [aim]


def _stages(sight: Sight, encoded: list[bytes]) -> dict[str, float]:
    """Median milliseconds of processor time of each stage over some images. Those of the networks are for one view each."""
    pictures = []
    for data in encoded:
        pixels = clean_image(data, LIMITS).pixels
        pictures.append(np.frombuffer(pixels.data, np.uint8).reshape(pixels.height, pixels.width, 3))
    open_nsfw, image_safety, reader = nets.OpenNsfw(), nets.ImageSafety(), TextReader()
    crops, pads = [nets.crop(each) for each in pictures], [nets.pad(each) for each in pictures]
    indices = range(len(pictures))
    return {
        "decode, orient, two resizes": _median(lambda index: clean_image(encoded[index], LIMITS), indices),
        "frame": _median(lambda index: unframe(pictures[index]), indices),
        "skin, texture": _median(lambda index: skin.measure(skin.shrink(pictures[index])), indices),
        "two views": _median(lambda index: _two_views(pictures[index]), indices),
        "open_nsfw, 1 view": _median(lambda index: open_nsfw.look([crops[index]]), indices),
        "open_nsfw, of 4 views": _median(lambda index: open_nsfw.look([crops[index]] * 4), indices) / 4,
        "image_safety, 1 view": _median(lambda index: image_safety.look([pads[index]]), indices),
        "image_safety, of 4 views": _median(lambda index: image_safety.look([pads[index]] * 4), indices) / 4,
        "all of risk": _median(lambda index: sight.look(pictures[index]), indices),
        "text: gate": _median(lambda index: has_edges(pictures[index]), indices),
        "text: detection": _median(lambda index: reader._mark(pictures[index]), indices),
    }


def _two_views(picture: skin.RGB) -> tuple[skin.RGB, skin.RGB]:
    near = nets.approach(picture)
    return nets.crop(near), nets.pad(near)


def _median(work: Callable[[int], object], indices: range) -> float:
    work(0)
    taken = []
    for index in indices:
        began = time.process_time()
        work(index)
        taken.append((time.process_time() - began) * 1000)
    return round(statistics.median(taken), 2)


async def _rates(sets: dict[int, list[bytes]], *, seconds: float) -> dict[str, float]:
    """Images a second through the pool, by turns: decoding alone, and with both networks; by the side of the images."""
    screen = Screen(limits=LIMITS, children=CHILDREN, timeout_s=30.0, equipment=Equipment(text=False))
    await screen.start()
    try:
        rates: dict[str, list[float]] = defaultdict(list)
        for _ in range(3):
            for name, looks in (("decode", Looks()), ("networks", Looks(risk=True))):
                for side, encoded in sets.items():
                    done, began = 0, time.perf_counter()
                    while time.perf_counter() - began < seconds / 12:
                        await screen.clean(encoded, looks)
                        done += len(encoded)
                    rates[f"{name}, {side}"].append(done / (time.perf_counter() - began))
        return {name: round(statistics.median(found), 1) for name, found in rates.items()}
    finally:
        await screen.close()


def _alarms(sight: Sight, photos: Path) -> list[dict[str, Any]]:
    """By folder: the share of pictures that score at least each threshold, per detector and for nudity by both."""
    found: dict[str, list[dict[str, float]]] = defaultdict(list)
    for folder, image in _photos(photos, 300):
        found[folder].append(_scores(sight.look(np.asarray(image))))
    table = []
    for folder, scores in found.items():
        for detector in scores[0]:
            values = np.array([each[detector] for each in scores])
            shares = {str(least): round(float((values >= least).mean()), 4) for least in THRESHOLDS}
            table.append({"set": folder, "pictures": len(scores), "detector": detector, "share": shares})
    return table


def _tones(sight: Sight) -> list[dict[str, float]]:
    grain = np.random.default_rng(0).normal(0, 3 / 255, (256, 256, 1))
    light = np.linspace(0.92, 1.08, 256)[:, None, None] + grain
    planes = (np.clip(np.array(list(bytes.fromhex(tone))) * light, 0, 255).astype(np.uint8) for tone in MONK)
    return [{name: round(score, 3) for name, score in _scores(sight.look(plane)).items()} for plane in planes]


def _scores(findings: Findings) -> dict[str, float]:
    scores = {f"{signal.detector}.{signal.category}": signal.score for signal in findings.signals}
    both = scores[f"open_nsfw.{Category.SEXUAL}"] * scores[f"image_safety.{Category.SEXUAL}"]
    return {**scores, "both networks, geometric mean": both**0.5}


def _photos(archive: Path, each: int) -> list[Photo]:
    """Some pictures of each of the zip's folders, on white, the same ones every time."""
    with zipfile.ZipFile(archive) as photos:
        folders: dict[str, list[str]] = defaultdict(list)
        for name in sorted(photos.namelist()):
            if name.endswith((".webp", ".jpg", ".png")):
                folders[name.split("/")[0]].append(name)
        picked = [
            (folder, name)
            for folder, names in folders.items()
            for name in random.Random(7).sample(names, min(each, len(names)))
        ]
        return [(folder, _on_white(photos.read(name))) for folder, name in picked]


def _on_white(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data)).convert("RGBA")
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    white.alpha_composite(image)
    return white.convert("RGB")


def _drawn(seed: int) -> Image.Image:
    """Soft coloured noise with edges: nothing that a network knows."""
    noise = np.random.default_rng(seed).integers(0, 256, (16, 16, 3)).astype(np.uint8)
    return Image.fromarray(noise).resize((256, 256), Image.Resampling.BICUBIC)


def _jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()
