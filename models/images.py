"""Pixels -> the vision tower's patches, by the reference's own two resizes.

The reference hands its images to `qwen_vl_utils` without limits of their own, which resizes to multiples of
28 px and at most 16,384 visual tokens, and then to the processor, which resizes again to at most 1,280. Small
images are resized once in effect, large ones twice; doing both keeps the score (facts: lychee-rerank-mm,
section 1.4). A resize to the size that an image has already is left out, as Pillow itself would.

Patches stay 8-bit levels. What the processor does to them besides is linear, `(level / 255 - mean) / std` and
each frame twice, so the tower folds it into its first product (see `tower`): an eighth of the memory to fill,
to keep waiting and to send to a GPU.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from models import ModelFailed, Pixels
from models.packing import Grid

MIN_PIXELS = 4 * 28 * 28
MAX_PIXELS = 1280 * 28 * 28
FETCH_TOKENS = (4, 16_384)
"""Visual tokens that `qwen_vl_utils` leaves, at least and at most."""
MAX_RATIO = 200


@dataclass(frozen=True, slots=True)
class Colours:
    """What the processor makes of a level: `(level / 255 - mean) / std`, by channel: red, green, blue.

    The default is Qwen2.5-VL's own, which is CLIP's.
    """

    mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True, slots=True)
class Patches:
    """One image in the order in which the vision tower reads it.

    `levels` [patches, 3 * height * width], uint8: the patches of one visual token behind one another, tokens
    row by row, and in a patch red, green, blue. `patch_grid` is time (1), height and width in patches.
    """

    levels: Tensor
    patch_grid: tuple[int, int, int]
    colours: Colours
    frames: int

    @property
    def values(self) -> Tensor:
        """The processor's own `pixel_values` [patches, 3 * time * height * width], fp32, for the stock tower."""
        mean, std = (torch.tensor(each).view(-1, 1) for each in (self.colours.mean, self.colours.std))
        frame = self.levels.view(len(self.levels), len(mean), -1).float().div_(255).sub_(mean).div_(std)
        return frame.unsqueeze(2).repeat(1, 1, self.frames, 1).flatten(1)


class ImagePreparer:
    """The reference's image preparation for one checkpoint. Safe for several threads at once.

    A checkpoint may declare fewer pixels than the reference's 1,003,520 (a small model does), not more.
    """

    @classmethod
    def load(cls, directory: Path, *, patch: int, merge: int, temporal_patch: int) -> ImagePreparer:
        """As `preprocessor_config.json` of a checkpoint directory says, if there is one."""
        file = directory / "preprocessor_config.json"
        declared = json.loads(file.read_bytes()) if file.is_file() else {}
        return cls(declared, patch=patch, merge=merge, temporal_patch=temporal_patch)

    def __init__(self, declared: Mapping[str, Any], *, patch: int, merge: int, temporal_patch: int) -> None:
        """`declared` is a checkpoint's preprocessor_config.json."""
        most = declared.get("max_pixels") or (declared.get("size") or {}).get("longest_edge")
        self._patch, self._merge, self._frames = patch, merge, temporal_patch
        self._token = patch * merge  # px
        # The least and the most pixels that each of the two resizes leaves.
        self._limits = (
            tuple(tokens * self._token**2 for tokens in FETCH_TOKENS),
            (MIN_PIXELS, min(int(most or MAX_PIXELS), MAX_PIXELS)),
        )
        standard = Colours()
        self.colours = Colours(
            tuple(declared.get("image_mean") or standard.mean),
            tuple(declared.get("image_std") or standard.std),
        )

    @property
    def parameters(self) -> str:
        """All that decides, beside the pixels, what `prepare` returns; equal only where that is the same."""
        decisive = [self._patch, self._merge, self._limits, asdict(self.colours)]
        return json.dumps(decisive, sort_keys=True)

    @property
    def most_tokens(self) -> int:
        """Visual tokens of one image at most: those of the largest one, or of the longest that is one token high."""
        most = self._limits[-1][1] // self._token**2
        return max(most, math.isqrt(MAX_RATIO * most) + 1)

    def grid(self, pixels: Pixels, number: int) -> Grid:
        """The visual tokens of an image, from its size alone; `number` is its place in the job.

        Raises `ModelFailed` for an image that the model cannot see: one side over 200 times the other.
        """
        *_, (height, width) = self._sizes(pixels)
        return Grid(number, height // self._token, width // self._token)

    def prepare(self, pixels: Pixels) -> Patches:
        """Resize an image and cut it. Raises `ModelFailed` as `grid` does."""
        size = (pixels.height, pixels.width)
        picture: Image.Image | None = None
        for wanted in self._sizes(pixels):
            if wanted != size:
                picture = picture or Image.frombytes("RGB", (pixels.width, pixels.height), pixels.data)
                picture = picture.resize(wanted[::-1], Image.Resampling.BICUBIC)
                size = wanted
        rgb = np.frombuffer(pixels.data, dtype=np.uint8) if picture is None else np.asarray(picture)
        patch, merge = self._patch, self._merge
        rows, columns = (side // self._token for side in size)
        # [rows, merge, patch, columns, merge, patch, 3] -> [rows, columns, merge, merge, 3, patch, patch]
        patches = rgb.reshape(rows, merge, patch, columns, merge, patch, 3).transpose(0, 3, 1, 4, 6, 2, 5)
        return Patches(
            torch.from_numpy(np.array(patches, order="C")).view(-1, 3 * patch**2),
            (1, rows * merge, columns * merge),
            self.colours,
            self._frames,
        )

    def _sizes(self, pixels: Pixels) -> list[tuple[int, int]]:
        """(height, width) after the first and after the second resize."""
        size, sizes = (pixels.height, pixels.width), []
        try:
            for least, most in self._limits:
                size = smart_resize(*size, self._token, least, most)
                sizes.append(size)
        except ValueError as exc:
            raise ModelFailed("an image's sides are too unequal for the model") from exc
        return sizes


def smart_resize(height: int, width: int, factor: int, least: int, most: int) -> tuple[int, int]:
    """Height and width in multiples of `factor`, `least` to `most` pixels, of about the same shape.

    The formula of qwen_vl_utils' function of this name, and of transformers', which agrees on what the first leaves.
    Raises ValueError where one side is over 200 times the other.
    """
    if max(height, width) / min(height, width) > MAX_RATIO:
        raise ValueError(f"{width}x{height} is longer than {MAX_RATIO}:1")
    to_height = max(factor, round(height / factor) * factor)
    to_width = max(factor, round(width / factor) * factor)
    if to_height * to_width > most:
        beta = math.sqrt((height * width) / most)
        to_height = max(factor, math.floor(height / beta / factor) * factor)
        to_width = max(factor, math.floor(width / beta / factor) * factor)
    elif to_height * to_width < least:
        beta = math.sqrt(least / (height * width))
        to_height = math.ceil(height * beta / factor) * factor
        to_width = math.ceil(width * beta / factor) * factor
    return to_height, to_width
