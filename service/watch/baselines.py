"""What is ordinary for one client: a rate that knows its own spread, networks that were seen, queries that look alike.

Pure, and of a fixed size each: some numbers, no text, no address, no clock. A rate is counted in buckets of `BUCKET_S`
seconds; an exponentially weighted mean and second moment say how much of it is ordinary. The spread is what keeps bursts
from crying wolf: on over-dispersed traffic a Poisson limit alone raises a thousand false alarms a day.
"""

from __future__ import annotations

import math
from enum import IntEnum

from tenants.traffic import BINS, PSI, stability

BUCKET_S = 10.0
MINUTE = 6
"""Buckets."""
PACE = 0.01
"""The weight of a new bucket: the memory is 100 buckets long, some 17 minutes."""
SIGMAS = 6.0
"""Standard deviations above the mean, from which on a bucket is odd; the least that counts as one is the root of the mean."""
HIGH_SIGMAS = 4.0
"""From here on a bucket is high: it teaches no more, and confirms an odd one that is at most two buckets away."""
LEARNING = 30
"""Buckets without which nothing is known of a client."""
LONGEST_REST = 30
"""Buckets of silence that are learnt from at most: who sleeps at night is not new each morning."""
KEPT_SHAPES = 8
MOST_NETWORKS = 16
"""Of one key; one with more roams, and a new network says nothing of it."""

MOST_CHARACTERS = 24
SKETCH = 4
ALIKE = 2
"""Numbers that two sketches share where their texts are nearly the same."""

WINDOW = 500
"""Scores of which one histogram is made, and compared with the reference."""
REFERENCE = 1_000
"""Scores without which there is no reference."""
REFERENCE_PACE, DRIFTING_PACE = 0.1, 0.03
"""The share of a window that the reference takes in, and of one that lies elsewhere."""


class Finding(IntEnum):
    """What a bucket is."""

    ORDINARY = 0
    ODD = 1
    """Above what is ordinary; told once a bucket."""
    CONFIRMED = 2
    """The second of three buckets: one of them odd, the other at least high."""


class Rate:
    """How often one client does something. One instance for each client and thing."""

    __slots__ = (
        *(
            "_bucket",
            "_count",
            "_flagged",
            "_high",
            "_highs",
            "_last",
            "_learnt",
            "_mean",
            "_odds",
            "_square",
        ),
        *("_greeted", "minute", "most"),
    )

    def __init__(self) -> None:
        self._bucket = -1
        self._count = 0
        self._last: list[int] = [0] * (MINUTE - 1)
        self._mean = 0.0
        self._square = 0.0
        self._learnt = 0
        self._odds = self._highs = 0
        """Of the bucket that is open and the two before, a bit for each."""
        self._flagged = self._greeted = False
        self._high = 0.0
        self.minute = 0
        """How often in the last minute, the bucket that is open included."""
        self.most = 0.0
        """What is ordinary in one bucket; 0 while nothing is known."""

    @property
    def mean(self) -> float:
        """Of a bucket."""
        return self._mean

    @property
    def is_known(self) -> bool:
        """Whether it is known what is ordinary."""
        return self._learnt >= LEARNING

    def settle(self, of: Rate) -> None:
        """Where nothing was counted so far, that is what is ordinary, if the rate that this is a part of is known."""
        if self._bucket < 0 and of.is_known:
            self._learnt = LEARNING
            self._set_most()

    def note(self, now_s: float, least: float, *, times: int = 1, always_from: float = math.inf) -> Finding:
        """Count one, or so many at once, at `now_s` of a clock that never goes back. Below `least` a minute nothing is odd.

        From `always_from` a minute on everything is, however ordinary it has become. While nothing is known, `least` decides
        alone, once, and nothing is confirmed: a restart forgets whoever is busy.
        """
        self.move(now_s)
        self._count += times
        self.minute += times
        reached = self.minute >= always_from
        if not self.is_known and not reached:
            if self._greeted or self.minute < least:
                return Finding.ORDINARY
            self._greeted = self._flagged = True
            return Finding.ODD
        if self._flagged or not (reached or (self.minute >= least and self._count > self._high)):
            return Finding.ORDINARY
        self._highs |= 1
        odd = reached or self._count > self.most
        if not odd and not self._odds:
            return Finding.ORDINARY
        confirmed = self._odds or self._highs > 1
        self._odds |= odd
        self._flagged = True
        return Finding.CONFIRMED if confirmed else Finding.ODD

    def move(self, now_s: float) -> None:
        """Close the buckets that are over."""
        bucket = int(now_s // BUCKET_S)
        passed = bucket - self._bucket
        if passed <= 0:
            return
        if self._bucket >= 0:
            self.learn(self._count)
            self._rest(min(passed - 1, LONGEST_REST))
            past = [*self._last, self._count, *[0] * min(passed - 1, MINUTE)]
            self._last = past[1 - MINUTE :]
            self._odds = (self._odds << min(passed, 3)) & 0b111
            self._highs = (self._highs << min(passed, 3)) & 0b111
        self._bucket, self._count, self._flagged = bucket, 0, False
        self.minute = sum(self._last)

    def learn(self, count: float) -> None:
        """Take a whole bucket in; of what is high no more than that, so that an attack teaches little."""
        pace = PACE
        if self._learnt < LEARNING:
            pace = max(PACE, 1 / (self._learnt + 1))
        elif count > self._high:
            count = self._high
        self._learnt += 1
        self._mean += pace * (count - self._mean)
        self._square += pace * (count * count - self._square)
        self._set_most()

    def _rest(self, buckets: int) -> None:
        if buckets <= 0:
            return
        if self._learnt < LEARNING:
            for _ in range(buckets):
                self.learn(0)
            return
        left = (1 - PACE) ** buckets
        self._mean *= left
        self._square *= left
        self._set_most()

    def _set_most(self) -> None:
        if self._learnt < LEARNING:
            return
        spread = math.sqrt(max(self._square - self._mean * self._mean, self._mean, 1.0))
        self._high = self._mean + HIGH_SIGMAS * spread
        self.most = self._mean + SIGMAS * spread


class Networks:
    """Where one key was used from, as networks that somebody else has made of addresses."""

    __slots__ = ("_seen", "began_s", "uses")

    def __init__(self, now_s: float) -> None:
        self._seen: set[str] = set()
        self.began_s = now_s
        self.uses = 0

    def is_new(self, network: str) -> bool:
        """Whether it was never seen; from now on it was. Of a key that roams nothing is new."""
        self.uses += 1
        if network in self._seen or len(self._seen) >= MOST_NETWORKS:
            return False
        self._seen.add(network)
        return True


class Shapes:
    """Sketches of one client's last queries."""

    __slots__ = ("_kept", "_next")

    def __init__(self) -> None:
        self._kept: list[frozenset[int]] = []
        self._next = 0

    def has_alike(self, sketch: frozenset[int]) -> bool:
        """Whether one of the last queries was nearly the same; this one is kept in the oldest's place."""
        least = min(ALIKE, len(sketch))
        alike = False
        for kept in self._kept:
            if not kept.isdisjoint(sketch) and len(kept & sketch) >= least:
                alike = True
                break
        if len(self._kept) < KEPT_SHAPES:
            self._kept.append(sketch)
        else:
            self._kept[self._next] = sketch
            self._next = (self._next + 1) % KEPT_SHAPES
        return alike


class Drift:
    """The scores of one tenant, held against what they were. Scores are from 0 to 1."""

    __slots__ = ("_bins", "_count", "_reference", "index")

    def __init__(self) -> None:
        self._bins = [0] * BINS
        self._count = 0
        self._reference: list[float] = []
        self.index = 0.0
        """The population stability index of the last whole window."""

    def note(self, score: float) -> bool:
        """Count one score; whether the window that it fills lies elsewhere than the reference.

        The reference follows, and what has come to stay is the reference in the end.
        """
        self._bins[min(int(score * BINS), BINS - 1)] += 1
        self._count += 1
        if self._count < WINDOW:
            return False
        window, self._bins, self._count = self._bins, [0] * BINS, 0
        if not self._reference:
            self._reference = [float(count) for count in window]
            return False
        if sum(self._reference) < REFERENCE:
            self._reference = [was + now for was, now in zip(self._reference, window, strict=True)]
            return False
        self.index = stability([round(count) for count in self._reference], window)
        drifted = self.index > PSI
        pace, scale = DRIFTING_PACE if drifted else REFERENCE_PACE, sum(self._reference) / WINDOW
        self._reference = [
            was + pace * (now * scale - was) for was, now in zip(self._reference, window, strict=True)
        ]
        return drifted


def sketch(text: str) -> frozenset[int]:
    """At most four numbers, of which texts that are nearly the same share two; nothing leads back to the text.

    The least hashes (a bottom-k sketch: Broder 1997) of the runs of four characters, without case and spaces, among the
    first 24. The hash is the interpreter's own, keyed at random in every process.
    """
    folded = "".join(text[: 2 * MOST_CHARACTERS].lower().split())[:MOST_CHARACTERS]
    runs = {*map(hash, zip(folded, folded[1:], folded[2:], folded[3:], strict=False))} or {hash(folded)}
    return frozenset(sorted(runs)[:SKETCH])
