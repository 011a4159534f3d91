"""What became of a fleet's workers, and what they did: totals since the fleet was made, for whoever counts."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from enum import Enum

from models import Work


class Retirement(Enum):
    """Why a worker at rest is let go, in the log's words."""

    IDLE = "idle"
    SEAT = "another tenant needs its seat"
    WEIGHTS = "its weights are no longer to be trusted"


@dataclass(slots=True)
class Tally:
    """Every number only grows.

    `starts` by outcome, `ready` or `failed`; `ends` by the name of a `Retirement`, in small letters, or by the
    `processes.children.Cause` of a loss; `work` of all workers, those that are gone included.
    """

    starts: Counter[str] = field(default_factory=Counter)
    ends: Counter[str] = field(default_factory=Counter)
    work: Work = field(default_factory=Work)
