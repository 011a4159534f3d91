"""The two resizes at their edges: the tallest and widest images that a model sees, the smallest, and the largest.

`test_patches` holds what is ordinary to the reference bit by bit; here each image meets one of the limits.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from models import Pixels
from models.images import FETCH_TOKENS, MAX_PIXELS, ImagePreparer
from tests.assets.images import photo
from tests.reference import Qwen2VLImageProcessorPil, fetch_image

TOKEN = 28
"""Pixels of a visual token's side."""


@pytest.fixture
def preparer(tmp_path: Path) -> ImagePreparer:
    """Of a checkpoint that declares nothing: the reference's own limits hold."""
    (tmp_path / "preprocessor_config.json").write_text("{}")
    return ImagePreparer.load(tmp_path, patch=14, merge=2, temporal_patch=2)


def refer(picture: Image.Image) -> tuple[torch.Tensor, list[int]]:
    """The reference's code on the reference's limits: `pixel_values` and `image_grid_thw`."""
    processor = Qwen2VLImageProcessorPil(min_pixels=4 * TOKEN**2, max_pixels=1280 * TOKEN**2)
    features = processor(images=[fetch_image({"image": picture})], return_tensors="pt")
    return features["pixel_values"], features["image_grid_thw"][0].tolist()


@pytest.mark.parametrize(
    ("width", "height"),
    [
        (1, 1),
        (2, 399),
        (200, 1),
        (1, 200),
        (5600, 28),  # 200:1 in tokens, too
        (28, 5600),
        (8000, 42),  # 190:1, whose short side is rounded up to two tokens
        (55, 10_000),
        (29, 27),
        (1008, 995),  # 36 x 36 tokens: by rounding, 16 more than the processor's limit
        (1004, 1000),
        (1500, 1300),  # 54 x 46 after the first resize
        (3600, 3600),  # more than the first resize leaves
        (700, 20_000),  # no less, and long
    ],
    ids=lambda side: str(side),
)
def test_an_image_at_a_limit_has_the_references_values(
    preparer: ImagePreparer, width: int, height: int
) -> None:
    picture = photo(width, height)
    prepared = preparer.prepare(Pixels(width, height, picture.tobytes()))
    values, grid = refer(picture)
    assert list(prepared.patch_grid) == grid
    assert torch.equal(prepared.values, values)
    assert 4 <= len(values) // 4 <= MAX_PIXELS // TOKEN**2


def test_the_cases_pass_both_limits() -> None:
    assert round(1008 / TOKEN) * round(995 / TOKEN) > MAX_PIXELS // TOKEN**2
    assert round(3600 / TOKEN) ** 2 > FETCH_TOKENS[1]
    assert round(700 / TOKEN) * round(20_000 / TOKEN) > FETCH_TOKENS[1]


def test_one_resize_is_not_two(preparer: ImagePreparer) -> None:
    """Why both are done: without the first, three values in ten would be off by more than a level of 255."""
    picture = photo(1500, 1300)
    twice = preparer.prepare(Pixels(1500, 1300, picture.tobytes())).values
    processor = Qwen2VLImageProcessorPil(min_pixels=4 * TOKEN**2, max_pixels=1280 * TOKEN**2)
    once = processor(images=[picture], return_tensors="pt")["pixel_values"]
    level = 1 / 255 / min(preparer.colours.std)
    off = (twice - once).abs() > 1.01 * level
    assert once.shape == twice.shape and 0.2 < off.float().mean() < 0.5
