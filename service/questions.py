"""What the tenant's own worker is asked about an image: does it show one of these? One job, one pack.

The query is the image, the documents are descriptions of what may be risky and of what is not; the worker scores them as
it scores any documents. A category's signal is how far its description is ahead of the best harmless one: a reranker
says how relevant a text is, and to most images some harmless text is more relevant. It is evidence, not a verdict: its
table (`screening/calibration.json`) keeps it below the moderate threshold.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from models import Item, Job, ModelFailed, Pixels
from service.screening.signals import Signal
from tenants.risk import Category

DETECTOR = "model"

INSTRUCTION = "Given an image, judge whether the Document describes what the image shows"
RISKY: tuple[tuple[Category, str], ...] = (
    (Category.WEAPONS, "a photo of a gun, a rifle, a bomb or another weapon"),
    (Category.WEAPONS, "a person who threatens others with a knife"),
    (Category.DRUGS, "illegal drugs: powder, pills in a bag, a syringe, cannabis"),
    (Category.GORE, "blood, an open wound, a mutilated or dead body"),
    (Category.HATE, "a hate symbol such as a swastika, a burning cross or a terrorist flag"),
)
HARMLESS = (
    "an everyday photo of people, a place, food or an animal",
    "a product on a plain background",
    "a landscape, a street or a building",
    "a drawing, a chart, a screenshot or a page of text",
)
ASKED = tuple(sorted({category for category, _ in RISKY}))
"""The categories that are asked about."""


def question(image: Pixels) -> Job:
    """The job that asks about one image."""
    return Job(
        query=Item(image=image),
        candidates=tuple(Item(text) for text in (*(text for _, text in RISKY), *HARMLESS)),
        instruction=INSTRUCTION,
    )


def answers(margins: Sequence[float]) -> tuple[Signal, ...]:
    """The job's scores as signals, one for each category. Raises `ModelFailed` where a score is not finite."""
    if len(margins) != len(RISKY) + len(HARMLESS) or not all(map(math.isfinite, margins)):
        raise ModelFailed
    harmless = max(margins[len(RISKY) :])
    ahead: dict[Category, float] = {}
    for (category, _), margin in zip(RISKY, margins, strict=False):
        ahead[category] = max(ahead.get(category, -math.inf), margin - harmless)
    return tuple(
        Signal(DETECTOR, category, 1.0 / (1.0 + math.exp(min(-lead, 700.0))), f"{DETECTOR}.{category}")
        for category, lead in ahead.items()
    )
