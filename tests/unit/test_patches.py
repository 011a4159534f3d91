"""Prepared images are the reference's, bit for bit: its two resizes, its processor's values, its refusals."""

from __future__ import annotations

import json
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from models import ModelFailed, Pixels
from models.images import Colours, ImagePreparer, smart_resize
from models.packing import Grid
from tests.reference import Qwen2VLImageProcessorPil, fetch_image, fetch_resize, process_resize

FACTOR = 28
SMALL = {"max_pixels": 12_544, "min_pixels": 3_136}
OTHER_COLOURS = {"image_mean": [0.1, 0.5, 0.7], "image_std": [0.4, 0.2, 0.3]}


def make_preparer(directory: Path, declared: dict[str, Any], *, patch: int = 14) -> ImagePreparer:
    (directory / "preprocessor_config.json").write_text(json.dumps(declared))
    return ImagePreparer.load(directory, patch=patch, merge=2, temporal_patch=2)


def noise(width: int, height: int, seed: int = 0) -> Pixels:
    return Pixels(width, height, random.Random(seed).randbytes(width * height * 3))


def reference(pixels: Pixels, declared: dict[str, Any]) -> tuple[Tensor, tuple[int, ...]]:
    """`pixel_values` and `image_grid_thw`, by qwen_vl_utils and the stock processor."""
    image = Image.frombytes("RGB", (pixels.width, pixels.height), pixels.data)
    limits = {"min_pixels": 4 * FACTOR**2, "max_pixels": 1280 * FACTOR**2}
    features = Qwen2VLImageProcessorPil(**limits | declared)(
        images=[fetch_image({"image": image})], return_tensors="pt"
    )
    return features["pixel_values"], tuple(features["image_grid_thw"][0].tolist())


@pytest.mark.parametrize("declared", [{}, SMALL, SMALL | OTHER_COLOURS])
@pytest.mark.parametrize(
    "size", [(112, 112), (224, 224), (640, 480), (33, 500), (3, 7), (1, 150), (1500, 1300)], ids=str
)
def test_values_are_the_processors_own_to_the_bit(
    tmp_path: Path, declared: dict[str, Any], size: tuple[int, int]
) -> None:
    """From no resize at all to both: 1,500 x 1,300 passes through 1,512 x 1,288."""
    pixels, preparer = noise(*size), make_preparer(tmp_path, declared)
    prepared = preparer.prepare(pixels)
    values, patch_grid = reference(pixels, declared)
    assert prepared.patch_grid == patch_grid
    assert prepared.values.dtype == torch.float32 and torch.equal(prepared.values, values)
    assert preparer.grid(pixels, 5) == Grid(5, patch_grid[1] // 2, patch_grid[2] // 2)


def test_every_level_has_the_processors_value(tmp_path: Path) -> None:
    levels = np.repeat(np.arange(256, dtype=np.uint8), 3).tobytes()
    pixels = Pixels(112, 112, (levels * 49)[: 112 * 112 * 3])
    assert torch.equal(make_preparer(tmp_path, {}).prepare(pixels).values, reference(pixels, {})[0])


sides = st.integers(1, 20_000)


@given(sides, sides)
@example(1, 200)
@example(1, 201)
@example(28 * 200, 28)
@example(5_720, 41)  # 140 : 1, but 204 : 1 once it is in multiples of 28
@example(20_000, 20_000)
def test_sizes_are_the_reference_libraries_own(height: int, width: int) -> None:
    limits = [(4 * FACTOR**2, most * FACTOR**2) for most in (16_384, 1280, 16)]

    def of_reference() -> list[tuple[int, int]]:
        first: tuple[int, int] = fetch_resize(height, width, FACTOR)
        return [first, *(process_resize(*first, FACTOR, *each) for each in limits[1:])]

    def ours() -> list[tuple[int, int]]:
        first = smart_resize(height, width, FACTOR, *limits[0])
        return [first, *(smart_resize(*first, FACTOR, *each) for each in limits[1:])]

    try:
        wanted = of_reference()
    except ValueError:
        with pytest.raises(ValueError, match="longer than 200:1"):
            ours()
    else:
        assert ours() == wanted


@pytest.mark.parametrize("size", [(1, 201), (5_720, 41)])
def test_sides_too_unequal_are_refused(tmp_path: Path, size: tuple[int, int]) -> None:
    pixels, preparer = noise(*size), make_preparer(tmp_path, {})
    with pytest.raises(ModelFailed, match="too unequal"):
        preparer.grid(pixels, 0)
    with pytest.raises(ModelFailed, match="too unequal"):
        preparer.prepare(pixels)


def test_several_threads_prepare_at_once(tmp_path: Path) -> None:
    preparer = make_preparer(tmp_path, SMALL)
    images = [noise(100 + 7 * seed, 160 - 5 * seed, seed) for seed in range(20)]
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(preparer.prepare, images))
    for pixels, prepared in zip(images, together, strict=True):
        assert torch.equal(prepared.values, reference(pixels, SMALL)[0])


def test_parameters_name_all_that_decides(tmp_path: Path) -> None:
    """Equal for equal settings, also those spelt out that are the default; else different."""
    standard = Colours()
    spelt = {"image_mean": standard.mean, "image_std": standard.std, "max_pixels": 1280 * FACTOR**2}
    assert make_preparer(tmp_path, {}).parameters == make_preparer(tmp_path, spelt).parameters
    different: list[dict[str, Any]] = [
        {},
        SMALL,
        OTHER_COLOURS,
        {"image_std": [0.4, 0.2, 0.3]},
        {"size": {"longest_edge": 9_408}},
    ]
    names = {make_preparer(tmp_path, declared).parameters for declared in different}
    names.add(make_preparer(tmp_path, {}, patch=16).parameters)
    assert len(names) == len(different) + 1
