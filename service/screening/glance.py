"""Both networks over one picture: only the views that are needed, and of all views the worst counts.

The networks look twice at most. First as they were trained: open_nsfw at the middle, image_safety at all of it. Where that
is quiet, it is all. Where it is neither quiet nor clear, or there is no colour to go by, they look again: at the rim, and at
the picture without its colours, tinted like skin, so that a grey or hue-rotated copy scores as its original does. Long strips
are cut into pieces.

A claim of gore must survive a second look as well: image_safety takes clothes on a floor for it, and what it claims depends
on the margins around them.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from service.screening import nets
from service.screening.framing import tiles
from service.screening.nets import Floats, ImageSafety, OpenNsfw, Safety
from service.screening.skin import RGB

QUIET_NSFW, QUIET_SEXUAL = 0.05, 0.10
"""A first look below both ends it. Of photographs of things, three in four do."""
CLEAR = 0.9
"""A first look of which both networks are this sure ends it too."""
COLOURLESS = 12.0
"""Mean saturation, of 255, below which a picture counts as grey."""
TINT_CR, TINT_CB = 148, 112
"""Chroma of skin, in its range's middle: what a picture without its colours is tinted with."""
SECOND_OPINION = 0.15
"""image_safety is asked about a tinted view where open_nsfw gives it at least this much."""
DOUBTED_GORE = 0.25
"""A claim of gore above it is looked at again."""


@dataclass(frozen=True, slots=True)
class Glance:
    """The worst that was seen, from 0 to 1; None of a network that is not there."""

    nsfw: float | None
    sexual: float | None
    gore: float | None
    features: Floats | None
    """open_nsfw's of the views that it saw as it was trained, [views, 1024]."""


def glance(
    picture: RGB, *, saturation: float, open_nsfw: OpenNsfw | None, image_safety: ImageSafety | None
) -> Glance:
    """What the networks see in a picture without a frame, of which `saturation` is the mean.

    Raises NetFailed.
    """
    pieces = tuple(nets.approach(piece) for piece in (picture, *tiles(picture)))
    middles = [nets.crop(piece) for piece in pieces]
    nsfw, features = _ask_nsfw(open_nsfw, middles)
    first = _ask_safety(image_safety, [nets.pad(piece) for piece in pieces])
    loud = (nsfw >= QUIET_NSFW) | (first.sexual >= QUIET_SEXUAL) | (saturation < COLOURLESS)
    clear = (nsfw >= CLEAR) & (first.sexual >= CLEAR)
    again = [int(index) for index in np.flatnonzero(loud & ~clear)]
    rims, _ = _ask_nsfw(open_nsfw, [nets.squeeze(pieces[index]) for index in again])
    tinted, _ = _ask_nsfw(open_nsfw, [tint(middles[index]) for index in again])
    asked = [
        index
        for index, score in zip(again, tinted, strict=True)
        if open_nsfw is None or score >= SECOND_OPINION
    ]
    second = _ask_safety(image_safety, [tint(nets.pad(pieces[index])) for index in asked])
    gore = first.gore.copy()
    doubted = [int(index) for index in np.flatnonzero(gore >= DOUBTED_GORE)]
    gore[doubted] = np.sqrt(
        gore[doubted] * _ask_safety(image_safety, [middles[index] for index in doubted]).gore
    )
    return Glance(
        nsfw=_worst(nsfw, rims, tinted) if open_nsfw else None,
        sexual=_worst(first.sexual, second.sexual) if image_safety else None,
        gore=_worst(gore) if image_safety else None,
        features=features if open_nsfw else None,
    )


def tint(picture: RGB) -> RGB:
    """The picture's brightness, and everywhere the chroma of skin: much the same for all copies in other colours."""
    chroma = np.asarray(cv2.cvtColor(picture, cv2.COLOR_RGB2YCrCb), np.uint8)
    chroma[..., 1] = TINT_CR
    chroma[..., 2] = TINT_CB
    return np.asarray(cv2.cvtColor(chroma, cv2.COLOR_YCrCb2RGB), np.uint8)


def _ask_nsfw(net: OpenNsfw | None, views: list[RGB]) -> tuple[Floats, Floats]:
    """Scores [views] and features [views, 1024]; zeros where there is no network, which are not given on."""
    if net is None or not views:
        return np.zeros(len(views), np.float32), np.zeros((len(views), nets.FEATURE_COUNT), np.float32)
    return net.look(views)


def _ask_safety(net: ImageSafety | None, views: list[RGB]) -> Safety:
    """Scores [views]; zeros where there is no network, which are not given on."""
    if net is None or not views:
        return Safety(*np.zeros((2, len(views)), np.float32))
    return net.look(views)


def _worst(*scores: Floats) -> float:
    return min(1.0, max(0.0, float(np.concatenate(scores).max())))
