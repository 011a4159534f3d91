"""Abstract pictures that both networks take for nudity, though they show shaded ellipses: no other kind may lie here.

`shapes.json` was found by search: mutate colours and places of a few ellipses, keep what scores higher with both networks.
Run as a script, this searches anew (minutes) and writes it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from service.screening.skin import RGB

FILE = Path(__file__).with_suffix(".json")

# The ten tones of the Monk Skin Tone scale (Monk, 2019; skintone.google, CC BY 4.0), light to dark.
MONK = (
    (246, 237, 228),
    (243, 231, 219),
    (247, 234, 208),
    (234, 218, 186),
    (215, 189, 150),
    (160, 126, 86),
    (130, 92, 67),
    (96, 65, 52),
    (58, 49, 42),
    (41, 36, 32),
)


def shapes() -> list[RGB]:
    """The pictures, 256 × 256."""
    return [draw(shape) for shape in json.loads(FILE.read_text())]


def draw(shape: dict[str, Any], side: int = 256) -> RGB:
    """Soft ellipses on a plain ground: each is centre, radii, angle, shade and colour."""
    y, x = np.mgrid[0:side, 0:side] / side
    picture = np.full((side, side, 3), shape["ground"], float)
    for left, top, wide, tall, angle, shade, *colour in shape["ellipses"]:
        u = ((x - left) * np.cos(angle) + (y - top) * np.sin(angle)) / wide
        v = (-(x - left) * np.sin(angle) + (y - top) * np.cos(angle)) / tall
        radius = np.sqrt(u * u + v * v)
        share = 1 / (1 + np.exp(np.clip((radius - 1) * 30, -50, 50)))[..., None]
        light = (1 - shade * np.clip(radius, 0, 1.2) ** 2 - 0.25 * shade * u)[..., None]
        picture = picture * (1 - share) + np.array(colour) * light * share
    return np.asarray(np.clip(picture, 0, 255), np.uint8)


def search(seed: int, steps: int = 500) -> dict[str, Any]:
    """One picture that both networks score high."""
    from service.screening import nets

    random = np.random.default_rng(seed)
    nsfw, safety = nets.OpenNsfw(), nets.ImageSafety()

    def ellipse() -> list[float]:
        place = random.uniform([0.2, 0.2, 0.1, 0.1, 0, 0.1], [0.8, 0.8, 0.6, 0.6, 3.14, 0.8])
        return [*place, *np.clip(np.array(MONK[random.integers(2, 7)]) + random.normal(0, 12, 3), 0, 255)]

    def score(shape: dict[str, Any]) -> float:
        picture = draw(shape)
        return min(
            float(nsfw.look([nets.crop(picture)])[0][0]), float(safety.look([nets.pad(picture)]).sexual[0])
        )

    kept = [
        {
            "ground": [*random.uniform(0, 255, 3)],
            "ellipses": [ellipse() for _ in range(random.integers(3, 8))],
        }
        for _ in range(40)
    ]
    scored = sorted(((score(shape), index, shape) for index, shape in enumerate(kept)), reverse=True)[:6]
    for step in range(steps):
        shape = json.loads(json.dumps(scored[random.integers(len(scored))][2]))
        for each in shape["ellipses"]:
            if random.random() < 0.5:
                each[:] = np.array(each) + random.normal(0, [0.05, 0.05, 0.04, 0.04, 0.2, 0.1, 8, 8, 8])
                each[2:4] = np.maximum(each[2:4], 0.03)
        scored = sorted([*scored, (score(shape), 100 + step, shape)], reverse=True)[:6]
    return scored[0][2]


if __name__ == "__main__":
    FILE.write_text("[\n" + ",\n".join(json.dumps(search(seed)) for seed in range(3)) + "\n]\n")
