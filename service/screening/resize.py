"""The reference's two resizes, in integers (facts: rerank, section 1.4).

First `qwen_vl_utils.fetch_image`: multiples of 28 within 4 to 16,384 tokens of 28 × 28. Then the image
processor: the same within 4 to 1,280 tokens. Both are no-ops on their own result. So whoever has done both
hands on at most 3 MB, and the worker, which repeats them, computes on the very pixels that the whole image
would have given.
"""

from __future__ import annotations

import math

FACTOR = 28
MAX_RATIO = 200
FETCH_PIXELS = (4 * FACTOR**2, 16_384 * FACTOR**2)
PROCESSOR_PIXELS = (4 * FACTOR**2, 1_280 * FACTOR**2)
MAX_CLEAN_PIXELS = PROCESSOR_PIXELS[1]
"""Most pixels that leave the child."""


def smart_resize(height: int, width: int, pixels: tuple[int, int] = FETCH_PIXELS) -> tuple[int, int]:
    """Height and width as `qwen_vl_utils` has them. Raises ValueError beyond 200 : 1."""
    least, most = pixels
    if max(height, width) / min(height, width) > MAX_RATIO:
        raise ValueError(f"{width} × {height} is longer than {MAX_RATIO} : 1")
    to_height = max(FACTOR, round(height / FACTOR) * FACTOR)
    to_width = max(FACTOR, round(width / FACTOR) * FACTOR)
    if to_height * to_width > most:
        beta = math.sqrt((height * width) / most)
        to_height = math.floor(height / beta / FACTOR) * FACTOR
        to_width = math.floor(width / beta / FACTOR) * FACTOR
    elif to_height * to_width < least:
        beta = math.sqrt(least / (height * width))
        to_height = math.ceil(height * beta / FACTOR) * FACTOR
        to_width = math.ceil(width * beta / FACTOR) * FACTOR
    return to_height, to_width


def plan_resizes(height: int, width: int) -> tuple[tuple[int, int], ...]:
    """The sizes (height, width) to pass through, in order; none where the image may leave as it is.

    Raises ValueError where the model cannot take the shape: rounding to 28 stretches a thin image, and
    41 × 5,720 (140 : 1) becomes 28 × 5,712 (204 : 1), which the processor refuses.
    """
    first = smart_resize(height, width, FETCH_PIXELS)
    second = smart_resize(*first, PROCESSOR_PIXELS)
    if height * width <= MAX_CLEAN_PIXELS:
        return ()
    smart_resize(*second)  # the second step stretches too, and the worker begins with the first
    return first, second
