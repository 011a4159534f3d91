"""Pixels -> the vision tower's patches, by the reference's own two resizes.

The reference hands its images to `qwen_vl_utils` without limits of their own, which resizes to multiples of
28 px and at most 16,384 visual tokens, and then to the processor, which resizes again to at most 1,280. Small
images are resized once in effect, large ones twice; doing both keeps the score (facts: lychee-rerank-mm,
section 1.4).

`fetch_image` opens any path and any URL that it is given as a string. It is called here only, with a PIL image.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from models import ModelFailed, Pixels, weights
from models.packing import Grid
from models.stock import Qwen2VLImageProcessorPil, fetch_image

MIN_PIXELS = 4 * 28 * 28
MAX_PIXELS = 1280 * 28 * 28


@dataclass(frozen=True, slots=True)
class Patches:
    """One image as the vision tower reads it: `values` [patches, channels * time * height * width], fp32."""

    values: Tensor
    grid: Grid
    patch_grid: tuple[int, int, int]  # time, height, width in patches, before merging


class ImagePreparer:
    """The reference's image preparation for one checkpoint.

    A checkpoint may declare fewer pixels than the reference's 1,003,520 (a small model does), not more.
    """

    def __init__(self, directory: Path, *, patch: int, merge: int, temporal_patch: int) -> None:
        declared = weights.read_json(directory, "preprocessor_config.json")
        most = declared.get("max_pixels") or (declared.get("size") or {}).get("longest_edge") or MAX_PIXELS
        colours: dict[str, Any] = {
            key: declared[key] for key in ("image_mean", "image_std") if declared.get(key) is not None
        }
        self._patch, self._merge = patch, merge
        self._processor = Qwen2VLImageProcessorPil(
            min_pixels=MIN_PIXELS,
            max_pixels=min(int(most), MAX_PIXELS),
            patch_size=patch,
            merge_size=merge,
            temporal_patch_size=temporal_patch,
            **colours,
        )

    def prepare(self, images: Iterable[Pixels]) -> dict[Pixels, Patches]:
        """Prepare each distinct image once, numbered in the order of first appearance.

        Raises `ModelFailed` for an image that the model cannot see: one side over 200 times the other.
        """
        prepared: dict[Pixels, Patches] = {}
        for pixels in images:
            if pixels not in prepared:
                prepared[pixels] = self._prepare(pixels, len(prepared))
        return prepared

    def _prepare(self, pixels: Pixels, number: int) -> Patches:
        picture = Image.frombytes("RGB", (pixels.width, pixels.height), pixels.data)
        try:
            resized = fetch_image({"image": picture}, image_patch_size=self._patch)
            features = self._processor(images=[resized], return_tensors="pt")
        except ValueError as exc:
            raise ModelFailed("an image's sides are too unequal for the model") from exc
        time, height, width = (int(side) for side in features["image_grid_thw"][0])
        values: Tensor = features["pixel_values"].to(torch.float32)
        return Patches(
            values, Grid(number, height // self._merge, width // self._merge), (time, height, width)
        )
