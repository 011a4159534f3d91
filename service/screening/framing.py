"""Where in a picture to look: without a frame around it, and in pieces where it is long and thin.

A picture in a thick frame, or at the end of a long strip, is small or distorted to a network that sees 224 × 224 pixels.
Frames are cut off, so that a framed picture and its original look the same; strips are cut into squares.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from service.screening.skin import RGB, shrink

FRAME_STD = 6.0
"""Lines whose colours deviate less than this are uniform; JPEG leaves about 2."""
FRAME_STEP = 10.0
"""A line belongs to the frame while its mean colour is this near the outermost line's."""
LEAST_SHARE = 0.02
"""A content smaller than this share of a picture is not cut out: the picture is taken as plain."""
LEAST_SIDE = 24
ROUNDS = 4
"""Frames within frames, and the accuracy of their edges: each round looks closer."""

STRIP_ASPECT = 2.0
MOST_TILES = 6


@dataclass(frozen=True, slots=True)
class Box:
    """A part of a picture, in its pixels."""

    top: int
    left: int
    bottom: int
    right: int

    def of(self, picture: RGB) -> RGB:
        return picture[self.top : self.bottom, self.left : self.right]


def unframe(picture: RGB) -> RGB:
    """The picture without uniform margins on any side; the picture itself where it has none, or nothing else."""
    for _ in range(ROUNDS):
        box = _content(picture)
        if box is None:
            return picture
        picture = box.of(picture)
    return picture


def tiles(picture: RGB) -> tuple[RGB, ...]:
    """Pieces that together cover a picture with one side at least twice the other; none of any other picture.

    They are square as long as `MOST_TILES` suffice.
    """
    height, width = picture.shape[:2]
    long, short = max(height, width), min(height, width)
    if long < STRIP_ASPECT * short:
        return ()
    count = min(MOST_TILES, -(-long // short))
    length = max(short, -(-long // count))
    starts = [round(each * (long - length) / (count - 1)) for each in range(count)]
    if height >= width:
        return tuple(picture[start : start + length] for start in starts)
    return tuple(picture[:, start : start + length] for start in starts)


def _content(picture: RGB) -> Box | None:
    """What the margins leave; None where there are no margins or nothing is left."""
    height, width = picture.shape[:2]
    copy = shrink(picture)
    if not any(_is_plain(line) for line in (copy[0], copy[-1], copy[:, 0], copy[:, -1])):
        return None  # most pictures end here
    small = copy.astype(np.float32)
    top, bottom = _margins(small)
    left, right = _margins(small.transpose(1, 0, 2))
    rows, columns = small.shape[:2]
    if top + bottom + left + right == 0 or top + bottom >= rows or left + right >= columns:
        return None
    box = Box(
        top=-(-top * height // rows),
        left=-(-left * width // columns),
        bottom=(rows - bottom) * height // rows,
        right=(columns - right) * width // columns,
    )
    kept_height, kept_width = box.bottom - box.top, box.right - box.left
    if min(kept_height, kept_width) < LEAST_SIDE or kept_height * kept_width < LEAST_SHARE * height * width:
        return None
    return box


def _margins(lines: npt.NDArray[np.float32]) -> tuple[int, int]:
    """Uniform lines at the start and at the end of float32 [lines, pixels, 3]."""
    means = lines.mean(axis=1)
    plain = lines.std(axis=1).max(axis=1) < FRAME_STD
    return _run(means, plain), _run(means[::-1], plain[::-1])


def _is_plain(line: RGB) -> bool:
    """Of uint8 [pixels, 3]."""
    return float(line.std(axis=0).max()) < FRAME_STD


def _run(means: npt.NDArray[np.float32], plain: npt.NDArray[np.bool_]) -> int:
    like = plain & (np.abs(means - means[0]).max(axis=1) < FRAME_STEP)
    return int(np.argmin(like)) if not like.all() else len(like)
