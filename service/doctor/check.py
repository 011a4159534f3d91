"""One check of a promise: what it looks at, and what it finds. A look that fails is never a pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from service.doctor.sight import Sight


class State(StrEnum):
    """Whether a promise holds."""

    HOLDS = "holds"
    BROKEN = "does not hold"
    UNKNOWN = "cannot tell"


class Unseen(Exception):
    """What would have to be looked at cannot be seen from here; the text says why."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What a look found."""

    state: State
    seen: str
    """What was looked at, and how it is."""
    remedy: str = ""
    """What to do, where it does not hold."""


@dataclass(frozen=True, slots=True)
class Check:
    """`look` finds out whether what `promise` says holds. It may raise `Unseen`, or anything else."""

    name: str
    promise: str
    look: Callable[[Sight], Finding]


@dataclass(frozen=True, slots=True)
class Result:
    """A check that was made."""

    name: str
    promise: str
    state: State
    seen: str
    remedy: str


def judge(faults: Iterable[str], seen: str, remedy: str) -> Finding:
    """It holds where nothing is wrong; else the faults are told, and the remedy."""
    wrong = [fault for fault in faults if fault]
    if not wrong:
        return Finding(State.HOLDS, seen)
    told = "; ".join(wrong[:10]) + (f"; {len(wrong) - 10} more" if len(wrong) > 10 else "")
    return Finding(State.BROKEN, told, remedy)


def make(checks: Iterable[Check], sight: Sight) -> Iterator[Result]:
    """Make one check after the other. One whose look raises cannot tell, with the error's type and never its text."""
    for check in checks:
        try:
            found = check.look(sight)
        except Unseen as exc:
            found = Finding(State.UNKNOWN, str(exc))
        except Exception as exc:  # noqa: BLE001 - whatever it was, the check has not passed, and the others go on
            found = Finding(State.UNKNOWN, f"the check itself failed: {type(exc).__name__}")
        yield Result(check.name, check.promise, found.state, found.seen, found.remedy)
