"""Text that stands in a picture, by PP-OCRv4's two networks (Apache-2.0), whose files the package `rapidocr-onnxruntime` has.

The network for detection marks where text is (differentiable binarisation, Liao et al., "Real-time scene text detection with
differentiable binarization", AAAI 2020); the one for recognition reads each line, English and Chinese (CTC, greedy). As in
`nets.py` only the files are used, and each must be the one that is pinned.

What is read is untrusted text like any other, and goes through the same rules.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from service.screening.nets import Floats, NetFile, open_session, run
from service.screening.skin import RGB, shrink

DETECTION = NetFile(
    "rapidocr_onnxruntime",
    "models/ch_PP-OCRv4_det_infer.onnx",
    "d2a7720d45a54257208b1e13e36a8479894cb74155a5efe29462512d42f49da9",
    "Apache-2.0",
)
RECOGNITION = NetFile(
    "rapidocr_onnxruntime",
    "models/ch_PP-OCRv4_rec_infer.onnx",
    "48fc40f24f6d2a207a2b1091d3437eb3cc3eb6b676dc3ef9c37384005483683b",
    "Apache-2.0",
)

DETECTION_SIDE = 736
"""Longest side of what detection sees, in pixels; letters below about 8 of them are lost."""
STRIDE = 32
MARK, LEAST_SCORE = 0.3, 0.5
"""A pixel is text from the first on; a box counts where its mean is at least the second."""
UNCLIP = 1.6
"""Boxes are marked smaller than text; by how much they grow: area × this / perimeter on each side."""
LEAST_SIDE = 3.0
MOST_LINES = 64

LINE_HEIGHT, LEAST_WIDTH, MOST_WIDTH = 48, 48, 1600
MOST_COLUMNS = 16_000
"""Width of all lines that are read, at `LINE_HEIGHT`: fifty of forty letters, about a second. A page in small print has
more, and is read in part."""
MOST_TURNED = 12
"""Lines that are read the other way up as well."""
LINES_IN_RUN = 2
"""More at a time take more memory, and on one thread no less time."""
LEAST_CONFIDENCE, SURE = 0.5, 0.85
"""A line below the first is noise; one below the second is also read the other way up."""
STANDING = 1.5
"""A box this much taller than wide is a line on its side."""

GATE_SIDE = 512
STRONG_EDGE = 96
LEAST_EDGES = 0.0005
"""Share of pixels with a strong edge: one short word in a large picture has as many."""
STRETCH, STRETCH_SIGMA = 12.0, 15.0
"""In the stretched copy, differences to the surroundings count so many times."""


@dataclass(frozen=True, slots=True)
class Reading:
    """Lines of text, from top to bottom, and whether they are all that was found."""

    lines: tuple[str, ...]
    whole: bool


class TextReader:
    """Reads text in pictures. Raises NetMissing where a file is not there. Not for several threads."""

    name = "ocr"

    def __init__(self) -> None:
        self._detection = open_session(DETECTION.read(), keeps_memory=False)
        self._recognition = open_session(RECOGNITION.read(), keeps_memory=False)
        listed = self._recognition.get_modelmeta().custom_metadata_map["character"].splitlines()
        self._characters = ["", *listed, " "]  # 0 is CTC's blank

    def read(self, picture: RGB, *, strict: bool) -> Reading:
        """The text in a picture, uint8 [height, width, 3]. Raises NetFailed.

        Without `strict`, a picture with hardly an edge is not looked at; with it, every picture is, and once more
        with its contrast stretched, for text that all but has the colour of its ground.
        """
        if not strict and not has_edges(picture):
            return Reading((), whole=True)
        readings = [self._read(picture)]
        if strict:
            readings.append(self._read(stretch(picture)))
        lines = [line for reading in readings for line in reading.lines]
        return Reading(tuple(dict.fromkeys(lines)), whole=all(reading.whole for reading in readings))

    def warm_up(self) -> None:
        """Take the memory that a page full of text needs."""
        self._mark(np.zeros((DETECTION_SIDE, DETECTION_SIDE, 3), np.uint8))
        self._recognise([np.zeros((LINE_HEIGHT, MOST_WIDTH, 3), np.uint8)] * LINES_IN_RUN)

    def _read(self, picture: RGB) -> Reading:
        """Largest lines first, as far as `MOST_COLUMNS` go; given from top to bottom."""
        boxes = self._boxes(picture)
        lines = [piece for box in boxes for piece in _pieces(_cut(picture, box))]
        left = MOST_COLUMNS
        read: dict[int, tuple[str, float]] = {}
        # Similar widths go through the network together, for all are padded to the widest.
        order = sorted(range(len(lines)), key=lambda index: -lines[index].shape[0])
        affordable = []
        for index in order:
            left -= _width(lines[index])
            if left < 0:
                break
            affordable.append(index)
        for indices in _batches(sorted(affordable, key=lambda index: _width(lines[index]))):
            read |= zip(indices, self._recognise([lines[index] for index in indices]), strict=True)
        doubtful = [index for index in affordable if read[index][1] < SURE][:MOST_TURNED]
        for indices in _batches(doubtful):  # upside down, perhaps
            turned = self._recognise([np.rot90(lines[index], 2) for index in indices])
            for index, other in zip(indices, turned, strict=True):
                read[index] = max(read[index], other, key=lambda line: line[1])
        return Reading(
            tuple(
                text
                for text, confidence in (read[index] for index in sorted(read))
                if text.strip() and confidence >= LEAST_CONFIDENCE
            ),
            whole=len(affordable) == len(lines) and len(boxes) < MOST_LINES,
        )

    def _boxes(self, picture: RGB) -> list[Floats]:
        """Where lines of text are: corners [4, (x, y)] from the upper left on, clockwise, in the picture's pixels."""
        marks = self._mark(picture)
        scale = np.array([picture.shape[1] / marks.shape[1], picture.shape[0] / marks.shape[0]], np.float32)
        mask = cv2.dilate((marks > MARK).astype(np.uint8), np.ones((2, 2), np.uint8))
        contours, _ = cv2.findContours(mask, cv2.RETR_LIST, cv2.CHAIN_APPROX_SIMPLE)
        boxes: list[Floats] = []
        for contour in sorted(contours, key=cv2.contourArea, reverse=True)[: 4 * MOST_LINES]:
            (x, y), (width, height), angle = cv2.minAreaRect(contour)
            if min(width, height) < LEAST_SIDE or _mean_within(marks, contour) < LEAST_SCORE:
                continue
            growth = width * height * UNCLIP / (width + height)  # 2 × area × UNCLIP / perimeter
            corners = cv2.boxPoints(((x, y), (width + growth, height + growth), angle))
            boxes.append(_clockwise(np.asarray(corners, np.float32)) * scale)
        return sorted(boxes[:MOST_LINES], key=lambda box: (round(float(box[0, 1]) / 10), float(box[0, 0])))

    def _mark(self, picture: RGB) -> Floats:
        """How much each pixel of a smaller copy is text, float32 [height, width], from 0 to 1."""
        height, width = picture.shape[:2]
        scale = min(1.0, DETECTION_SIDE / max(height, width))
        size = tuple(max(STRIDE, round(side * scale / STRIDE) * STRIDE) for side in (width, height))
        image = cv2.resize(picture, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
        (marks,) = run(self.name, self._detection, [], {"x": _normalised(np.asarray(image, np.uint8))[None]})
        return np.asarray(marks[0, 0], np.float32)

    def _recognise(self, crops: list[RGB]) -> list[tuple[str, float]]:
        """Each line's text and the mean probability of its characters."""
        widths = [_width(crop) for crop in crops]
        # Widths in steps: each new one makes onnxruntime plan its memory anew.
        batch = np.zeros((len(crops), 3, LINE_HEIGHT, -(-max(*widths, LEAST_WIDTH) // 96) * 96), np.float32)
        for row, crop, width in zip(batch, crops, widths, strict=True):
            image = cv2.resize(crop, (width, LINE_HEIGHT), interpolation=cv2.INTER_LINEAR)
            row[:, :, :width] = _normalised(np.asarray(image, np.uint8))
        (found,) = run(self.name, self._recognition, [], {"x": batch})  # [lines, steps, characters]
        return [self._decode(steps) for steps in found]

    def _decode(self, steps: Floats) -> tuple[str, float]:
        """CTC, greedy: runs of one character are one, blanks fall out."""
        best = steps.argmax(axis=1)
        first = np.ones(len(best), bool)
        first[1:] = best[1:] != best[:-1]
        kept = first & (best != 0)
        if not kept.any():
            return "", 0.0
        return "".join(self._characters[index] for index in best[kept]), float(steps.max(axis=1)[kept].mean())


def has_edges(picture: RGB) -> bool:
    """Whether there are as many strong edges as one short word has."""
    grey = cv2.cvtColor(shrink(picture, GATE_SIDE), cv2.COLOR_RGB2GRAY)
    across = cv2.morphologyEx(grey, cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8))
    return float((np.asarray(across) >= STRONG_EDGE).mean()) >= LEAST_EDGES


def stretch(picture: RGB) -> RGB:
    """The picture as grey values in which small differences to the surroundings are large."""
    grey = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY).astype(np.float32)
    lifted = 255.0 - STRETCH * np.abs(grey - cv2.GaussianBlur(grey, (0, 0), STRETCH_SIGMA))
    return np.repeat(np.clip(lifted, 0, 255).astype(np.uint8)[..., None], 3, axis=2)


def _width(line: RGB) -> int:
    """Of a line, at `LINE_HEIGHT`."""
    return int(min(MOST_WIDTH, max(1, round(LINE_HEIGHT * line.shape[1] / line.shape[0]))))


def _pieces(line: RGB) -> list[RGB]:
    """A line that is too long for one look, in equal parts."""
    count = -(-line.shape[1] * LINE_HEIGHT // (line.shape[0] * MOST_WIDTH))
    return list(np.array_split(line, count, axis=1)) if count > 1 else [line]


def _batches(indices: Sequence[int]) -> Iterator[Sequence[int]]:
    for start in range(0, len(indices), LINES_IN_RUN):
        yield indices[start : start + LINES_IN_RUN]


def _normalised(image: RGB) -> Floats:
    """float32 [3, height, width] from −1 to 1, blue first: PP-OCR was trained on what OpenCV reads."""
    return np.asarray((image[..., ::-1].astype(np.float32) / 127.5 - 1.0).transpose(2, 0, 1), np.float32)


def _mean_within(marks: Floats, contour: Any) -> float:
    x, y, width, height = cv2.boundingRect(contour)
    inside = np.zeros((height, width), np.uint8)
    cv2.fillPoly(inside, [contour - np.array([x, y])], 1)
    return float(cv2.mean(marks[y : y + height, x : x + width], inside)[0])


def _clockwise(corners: Floats) -> Floats:
    """From the upper left on."""
    by_x = corners[np.argsort(corners[:, 0])]
    left, right = by_x[:2], by_x[2:]
    (top_left, bottom_left), (top_right, bottom_right) = (
        left[np.argsort(left[:, 1])],
        right[np.argsort(right[:, 1])],
    )
    return np.stack([top_left, top_right, bottom_right, bottom_left])


def _cut(picture: RGB, box: Floats) -> RGB:
    """A line of text, upright, uint8 [height, width, 3]."""
    width = max(1, round(float(max(np.linalg.norm(box[0] - box[1]), np.linalg.norm(box[2] - box[3])))))
    height = max(1, round(float(max(np.linalg.norm(box[0] - box[3]), np.linalg.norm(box[1] - box[2])))))
    target = np.array([[0, 0], [width, 0], [width, height], [0, height]], np.float32)
    turn = cv2.getPerspectiveTransform(box.astype(np.float32), target)
    line: npt.NDArray[Any] = cv2.warpPerspective(
        picture, turn, (width, height), flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE
    )
    return np.asarray(np.rot90(line) if height >= STANDING * width else line, np.uint8)
