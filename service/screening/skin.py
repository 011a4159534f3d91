"""What can be told of a picture without a network: how much of it is skin, how smooth, how colourful, how busy.

Cheap (about 2 ms at 256 pixels), and weak: sand and wood are skin to it, and in a grey picture it finds none. So it never
decides alone: it says which further views of a picture the networks should see, and its own score stays below `MOST`.

Skin is Chai and Ngan's rule, 77 <= Cb <= 127 and 133 <= Cr <= 173 ("Face segmentation using skin-color map in videophone
applications", IEEE Trans. CSVT 9(4), 1999). Brightness is no part of it, which is why it finds dark skin as well as light;
rules with a floor for red do not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

RGB = npt.NDArray[np.uint8]
"""A picture: uint8 [height, width, 3], red first."""

SIDE = 256
"""Longest side of the copy that everything here is measured on."""

LEAST_CR, MOST_CR = 133, 173
LEAST_CB, MOST_CB = 77, 127
SMOOTH_STD = 12.0
"""Skin whose grey values deviate less than this within 7 × 7 pixels is smooth: skin is, sand and wood mostly are not."""
WINDOW = 7
MOST = 0.59
"""Most that skin alone may score: below the moderate threshold."""


@dataclass(frozen=True, slots=True)
class Cues:
    """Measures of one picture. Shares are of its area, from 0 to 1."""

    skin: float
    largest: float
    """Share of the largest connected piece of skin."""
    smooth: float
    """Share of skin that is smooth."""
    rim: float
    """Share of skin in the outer sixteenth on each side: what a centre crop does not see."""
    saturation: float
    """Mean of HSV's saturation, 0 to 255."""
    edges: float
    """Mean absolute Laplacian of the grey values, 0 upwards; text and drawings have much."""
    entropy: float
    """Of the grey values, in bits, 0 to 8."""


def shrink(picture: RGB, side: int = SIDE) -> RGB:
    """The picture with its longest side `side`, by area averaging; as it is where that is shorter."""
    height, width = picture.shape[:2]
    longest = max(height, width)
    if longest <= side:
        return picture
    whole = round(longest / (2 * side))
    if whole > 1 and min(height, width) >= 2 * whole:  # whole factors are five times as fast
        reduced = cv2.resize(picture, (width // whole, height // whole), interpolation=cv2.INTER_AREA)
        picture = _uint8(reduced)
    size = (max(1, round(width * side / longest)), max(1, round(height * side / longest)))
    return _uint8(cv2.resize(picture, size, interpolation=cv2.INTER_AREA))


def skin_mask(picture: RGB) -> RGB:
    """255 where a pixel has the chroma of skin, 0 elsewhere; uint8 [height, width]. Lone pixels are not counted."""
    chroma = cv2.cvtColor(picture, cv2.COLOR_RGB2YCrCb)
    mask = cv2.inRange(chroma, (0, LEAST_CR, LEAST_CB), (255, MOST_CR, MOST_CB))
    return _uint8(cv2.morphologyEx(mask, cv2.MORPH_OPEN, np.ones((3, 3), np.uint8)))


def measure(picture: RGB) -> Cues:
    """The cues of a picture that was shrunk before."""
    mask = skin_mask(picture)
    grey = _uint8(cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY))
    skin = mask > 0
    _, _, pieces, _ = cv2.connectedComponentsWithStats(mask, connectivity=8)
    largest = int(pieces[1:, cv2.CC_STAT_AREA].max()) if len(pieces) > 1 else 0
    counts = np.bincount(grey.ravel(), minlength=256)
    shares = counts[counts > 0] / grey.size
    rim = np.ones(skin.shape, bool)
    rim[_inner(skin.shape[0]), _inner(skin.shape[1])] = False
    return Cues(
        skin=float(skin.mean()),
        largest=largest / grey.size,
        smooth=float((skin & (local_std(grey) < SMOOTH_STD)).mean()),
        rim=float(skin[rim].mean()) if rim.any() else 0.0,
        saturation=float(_saturation(picture)),
        edges=float(np.abs(cv2.Laplacian(grey, cv2.CV_16S)).mean()),
        entropy=float(max(0.0, -(shares * np.log2(shares)).sum())),
    )


def score(cues: Cues) -> float:
    """How much a picture looks like bare skin, 0 to `MOST`: one large piece of it, and smooth."""
    return MOST * min(1.0, cues.largest / 0.5) * min(1.0, cues.smooth / 0.3)


def local_std(grey: RGB) -> npt.NDArray[np.float32]:
    """Standard deviation of grey values within `WINDOW` × `WINDOW` pixels; float32 [height, width]."""
    values = grey.astype(np.float32)
    mean = cv2.blur(values, (WINDOW, WINDOW))
    square = cv2.blur(values * values, (WINDOW, WINDOW))
    return np.sqrt(np.maximum(square - mean * mean, 0.0), dtype=np.float32)


def _saturation(picture: RGB) -> float:
    """Mean of (max − min) / max over the channels, 0 to 255."""
    return float(cv2.mean(cv2.extractChannel(cv2.cvtColor(picture, cv2.COLOR_RGB2HSV), 1))[0])


def _inner(length: int) -> slice:
    cut = round(length / 16)
    return slice(cut, length - cut)


def _uint8(picture: Any) -> RGB:
    """OpenCV's answer as what it is: its stubs allow any depth."""
    array: RGB = np.asarray(picture, dtype=np.uint8)
    return array
