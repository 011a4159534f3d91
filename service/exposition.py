"""What `/metrics` says: what was counted, and what is at the moment. It asks no database and no other process."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from service.watch import metrics

if TYPE_CHECKING:
    from prometheus_client import Counter

    from models import Work
    from service.fleet.router import Fleet
    from service.screening.pool import Screen
    from service.screening.readers import Readers
    from service.sequencing import Sequencing


class Exposition:
    """One to a gateway. Belongs to its event loop."""

    def __init__(self, *, fleet: Fleet, screen: Screen, readers: Readers, sequencing: Sequencing) -> None:
        self._fleet = fleet
        self._screen = screen
        self._readers = readers
        self._sequencing = sequencing
        self._told: dict[tuple[Counter, tuple[str, ...]], int] = {}

    async def render(self) -> bytes:
        """Every metric in Prometheus's text format. Requests go on while it is written."""
        self._tell_parts()
        self._tell_workers()
        self._tell_work(self._fleet.tally.work)
        return await asyncio.to_thread(metrics.render)

    def _tell_parts(self) -> None:
        parts = {
            "worker": self._fleet.ready,
            "screening": self._screen.ready and self._readers.ready,
            "log": not self._sequencing.fault,
        }
        for part, ready in parts.items():
            metrics.READY.labels(part).set(ready)
        for detector in (*self._screen.detectors, *self._readers.detectors):
            metrics.DETECTOR_FAILURES.labels(detector.name)  # at 0 before the first one
        for looks_at, losses in (("images", self._screen.losses), ("texts", self._readers.losses)):
            for reason, count in losses.items():
                self._catch_up(metrics.SCREENING_LOSSES, count, looks_at, reason)

    def _tell_workers(self) -> None:
        fleet = self._fleet
        workers = fleet.workers()
        for state in ("assigned", "spare"):
            metrics.WORKERS.labels(state).set(sum(worker.state == state for worker in workers))
        metrics.WORKER_COMPILATIONS.set(sum(worker.compilations for worker in workers))
        metrics.LENT_BYTES.set(fleet.lent.size_bytes)
        metrics.LENT_WORKERS.set(fleet.lent.workers)
        metrics.LENT_CHANGES.set(fleet.lent.changes)
        metrics.JOBS.labels("running").set(sum(worker.running for worker in workers))
        metrics.JOBS.labels("waiting").set(fleet.waiting)
        metrics.OLDEST_WAIT.set(fleet.longest_wait_s)
        for outcome, count in fleet.tally.starts.items():
            self._catch_up(metrics.WORKER_STARTS, count, outcome)
        for reason, count in fleet.tally.ends.items():
            self._catch_up(metrics.WORKER_ENDS, count, reason)

    def _tell_work(self, work: Work) -> None:
        self._catch_up(metrics.PACKS, work.packs)
        self._catch_up(metrics.PACKED_TOKENS, work.packed_tokens)
        self._catch_up(metrics.PACK_ROOM_TOKENS, work.room_tokens)
        for cache, hits, misses in (
            ("image_features", work.images_kept, work.images_seen),
            ("prefix", work.prefixes_kept, work.prefixes_read),
            ("candidate", work.candidates_kept, work.candidates_read),
        ):
            self._catch_up(metrics.CACHE, hits, cache, "hit")
            self._catch_up(metrics.CACHE, misses, cache, "miss")

    def _catch_up(self, counter: Counter, total: int, *labels: str) -> None:
        """Bring a counter up to a total that is kept elsewhere."""
        child = counter.labels(*labels) if labels else counter
        child.inc(total - self._told.get((counter, labels), 0))
        self._told[counter, labels] = total
