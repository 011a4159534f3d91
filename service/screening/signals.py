"""What detectors report and `judge` reads. Numbers and names only: never a piece of what was screened.

A detector that could not run is in `Findings.failed`; it is never silently a score of 0.
"""

from __future__ import annotations

from dataclasses import dataclass

from tenants.kinds import ImageText as ImageText
from tenants.risk import Category


@dataclass(frozen=True, slots=True)
class Signal:
    """One detector's opinion of one item in one category."""

    detector: str
    """Its name, as in the calibration tables and in `/readyz`: `open_nsfw`, `skin`, `lexicon`, ..."""
    category: Category
    score: float
    """Raw, from 0 to 1; the judge calibrates it by the detector's table."""
    rule: str = ""
    """Which of the detector's rules, where it has several: `lexicon.weapons`, `injection.imperative`, ..."""
    certain: bool = False
    """Evidence that may count for two signals: an exact hit in a severe list, say."""


@dataclass(frozen=True, slots=True)
class Findings:
    """Everything that was found about one text or one image."""

    signals: tuple[Signal, ...] = ()
    failed: tuple[str, ...] = ()
    """Detectors that should have run and could not."""


RISK_DETECTORS = ("skin", "open_nsfw", "image_safety")
"""Ours that are asked about an image's risk; each gives a signal or has failed."""
IMAGE_DETECTORS = (*RISK_DETECTORS, "ocr")
"""Ours that look at images. No head and no plugin may take their names."""


@dataclass(frozen=True, slots=True)
class Looks:
    """What to look for in an image. By default nothing: it is decoded, and that is all that it costs."""

    risk: bool = False
    """Measure skin and ask the networks, plugins and heads that are active."""
    text: ImageText = ImageText.OFF
