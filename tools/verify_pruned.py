"""What `verify.py` checks of bodies that are gone: an entry of their own tenant must say so, and not too early.

Two kinds of entry do. `admin.log_prune`: what was recorded before `before_us` (microseconds since 1970), at least
`retention_days` before the entry itself. `admin.subject_erase`: the `entries` of these ids, for a person. Each is an entry of
the export like any other, verified where it stands in it.
"""

from __future__ import annotations

import json
import re
import uuid
from binascii import a2b_base64
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

MAGIC = b"pericarp/leaf/v1"
ENVELOPE_BYTES = 112
DAY_US = 86_400_000_000
# An entry's line; its body stands in it byte for byte.
ENTRY = re.compile(
    rb'\{"index":([0-9]{1,18}),"envelope":"([^"]+)"(?:,"row":"([^"]+)")?(?:,"pruned":(true)|,"body":(.+))?\}\n'
)
# In no string of a body: a quotation mark in one is escaped.
SAYS_SO = re.compile(rb'"operation":"admin\.(?:log_prune|subject_erase)"')


class Wrong(Exception):
    """Something does not hold; the message names it."""


class Unreadable(Exception):
    """What was given is not what it should be, so nothing can be said of it."""


class Said(NamedTuple):
    """What one entry says: the time before which bodies go and after how many days, or whose."""

    before_us: int = 0
    days: int = 0
    entries: tuple[bytes, ...] = ()


class Pruned:
    """Holds what the entries of one export say of bodies that are gone, and counts these."""

    def __init__(self, lines: Callable[[], Iterable[bytes]], retention_days: int = 1) -> None:
        """`lines` reads the export from its beginning; `retention_days`: how long bodies are to be kept at least."""
        self._lines = lines
        self._least = max(retention_days, 1)
        self._before: dict[bytes, int] | None = None
        """By tenant; None until a body is gone, for the entry that says so comes later in the export."""
        self._erased: set[tuple[bytes, bytes]] = set()
        """Tenant and entry."""
        self._shortest = 0
        self._count = self._count_erased = 0

    def check_body(self, index: int, envelope: bytes, body: bytes) -> None:
        """Of an entry that holds: whether it lets bodies go too early. Raises `Wrong`."""
        said = read_body(body)
        if said is None or said.entries or not said.before_us:
            return
        if said.days < self._least:
            raise Wrong(
                f"index {index}: bodies are pruned after {said.days} days, not {self._least}{name_leaf(envelope)}"
            )
        if said.before_us > recorded_us(envelope) - said.days * DAY_US:
            raise Wrong(
                f"index {index}: bodies are pruned that are younger than {said.days} days{name_leaf(envelope)}"
            )
        self._shortest = min(self._shortest or said.days, said.days)

    def check_gone(self, index: int, envelope: bytes) -> None:
        """Of an entry without its body: whether another one says so. Raises `Wrong`."""
        if self._before is None:
            self._before = self._gather()
        tenant = envelope[32:48]
        if recorded_us(envelope) < self._before.get(tenant, 0):
            self._count += 1
        elif (tenant, envelope[48:64]) in self._erased:
            self._count_erased += 1
        else:
            raise Wrong(
                f"index {index}: the body is gone, too early for its time, and no entry says so{name_leaf(envelope)}"
            )

    def tell(self) -> str:
        """A line on what is gone; empty where nothing is."""
        if not self._count and not self._count_erased:
            return ""
        after = f" after {self._shortest} days or more" if self._shortest else ""
        return (
            f"\nBodies that are gone: {self._count} pruned{after}, {self._count_erased} erased for a person."
        )

    def _gather(self) -> dict[bytes, int]:
        """Read the export once more, for what all of its entries say."""
        before: dict[bytes, int] = {}
        for line in self._lines():
            if SAYS_SO.search(line) is None or (entry := ENTRY.fullmatch(line)) is None or not entry[5]:
                continue
            if (said := read_body(entry[5])) is None:
                continue
            tenant = a2b_base64(entry[2], strict_mode=True)[32:48]
            before[tenant] = max(before.get(tenant, 0), said.before_us)
            self._erased.update((tenant, each) for each in said.entries)
        return before


def read_lines(export: Path) -> Iterator[bytes]:
    """An export's lines, each with its end."""
    with export.open("rb") as file:
        yield from file


def read_body(body: bytes) -> Said | None:
    """What an entry says of bodies that go; None where nothing. Raises `ValueError` and the like for what cannot be read."""
    if SAYS_SO.search(body) is None:
        return None
    told = json.loads(body)
    if told["operation"] == "admin.subject_erase":
        return Said(entries=tuple(uuid.UUID(each).bytes for each in told["details"]["entries"]))
    if told["operation"] == "admin.log_prune":
        return Said(int(told["details"]["before_us"]), int(told["details"]["retention_days"]))
    return None


def recorded_us(envelope: bytes) -> int:
    """When a leaf says that its entry was recorded."""
    return int.from_bytes(envelope[24:32], "big")


def name_leaf(envelope: bytes) -> str:
    """Which entry a leaf says it is."""
    return f" (tenant {uuid.UUID(bytes=envelope[32:48])}, entry {uuid.UUID(bytes=envelope[48:64])})"
