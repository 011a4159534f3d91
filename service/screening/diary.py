"""What the log is told of the children that look at images and read texts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import structlog

from service.processes.children import FORBIDDEN_CALL
from service.processes.parent import UNFORESEEN
from service.processes.sandbox import missing

if TYPE_CHECKING:
    from service.processes.children import Child

OURS = (UNFORESEEN, FORBIDDEN_CALL.decode())

log = structlog.get_logger(source="screening")


def hear(line: str) -> None:
    """Log what a screening child says on its stderr. Of what a library prints, which may repeat an image's words or a
    text, only how long it is."""
    said = line if line.startswith(OURS) else f"{len(line)} characters of a library's"
    log.warning("A screening child says something.", action="child_says", line=said)


class Diary:
    """Of the children that take each other's place."""

    def __init__(self, looks_at: str) -> None:
        self._log = structlog.get_logger(source="screening")
        self._looks_at = looks_at
        self._told: dict[str, str] = {}

    def tell_confinement(self, child: Child) -> None:
        """Say what does not hold of a new child's measures, and why: once, not of each child again."""
        broken = missing(child.hello.sandbox)
        if broken and broken != self._told:
            self._log.warning(
                "A screening child is less confined than it should be.",
                action="sandbox",
                looks_at=self._looks_at,
                missing=list(broken),
                reasons=broken,
            )
        self._told = broken
