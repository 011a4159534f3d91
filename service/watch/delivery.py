"""Brings notifications to sinks, each in a line of its own: one that fails or hangs keeps no other waiting, and no request.

What cannot be sent is tried again after 1 s, 2 s, 4 s and so on up to a minute, for an hour; then it is dropped. So is
the oldest of a line that is full. Both are counted, and the log tells of a sink once when it begins to fail and once
when it works again.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from uuid import uuid4

from service.watch import metrics
from service.watch.alerts import Notification, fingerprint, stamp
from service.watch.logs import get_logger, where_it_broke
from service.watch.rules import SEVERITIES
from service.watch.sinks import SinkFailed

if TYPE_CHECKING:
    from service.watch.sinks import Place

MOST_WAITING = 100
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0
GIVE_UP_S = 3_600.0
BEATS = 3.0
"""Heartbeats that may be missing until the alert is over for Alertmanager."""
WATCHDOG = "Watchdog"

log = get_logger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class Waiting:
    """One notification in line."""

    notification: Notification
    since_s: float
    id: str = field(default_factory=lambda: f"msg_{uuid4().hex}")
    is_heartbeat: bool = False


class Delivery:
    """One sink's line. `clock`: seconds that never go back; `first_pause_s` is there for tests."""

    def __init__(
        self,
        place: Place,
        *,
        clock: Callable[[], float] = time.monotonic,
        first_pause_s: float = FIRST_PAUSE_S,
    ) -> None:
        self._place = place
        self._clock = clock
        self._first_pause_s = first_pause_s
        self._line: deque[Waiting] = deque()
        self._more = asyncio.Event()
        self._failing = False
        self._beat_s = float("-inf")
        for outcome in ("sent", "failed", "dropped"):
            metrics.ALERTS.labels(self.name, outcome)  # at 0 before the first one

    @property
    def name(self) -> str:
        return self._place.sink.name

    def take(self, notification: Notification) -> None:
        """Put it in line, where it is grave enough for this sink. Returns at once."""
        if SEVERITIES.index(notification.severity) >= SEVERITIES.index(self._place.severity):
            self._put(Waiting(notification, self._clock()))

    def beat(self, gateway: str, since: float) -> None:
        """Put a heartbeat in line, where one is due: an alert that always fires. `since`: seconds since 1970."""
        every_s = self._place.heartbeat_s
        now_s = self._clock()
        if every_s is None or now_s - self._beat_s < every_s:
            return
        self._beat_s = now_s
        if any(waiting.is_heartbeat for waiting in self._line):
            return  # the last one is not sent yet: its absence is the alarm
        self._put(Waiting(heartbeat(gateway, since, every_s), now_s, is_heartbeat=True))

    def _put(self, waiting: Waiting) -> None:
        if len(self._line) >= MOST_WAITING:
            self._line.popleft()
            self._count("dropped")
        self._line.append(waiting)
        self._more.set()

    async def keep(self) -> None:
        """Send what comes, until it is cancelled."""
        while True:
            await self._more.wait()
            while self._line:
                await self._bring(self._line[0])
            self._more.clear()

    async def _bring(self, waiting: Waiting) -> None:
        """Send it, or give it up; either way it is in line no longer."""
        pause_s = self._first_pause_s
        while waiting in self._line:
            try:
                await self._place.sink.send(waiting.notification, waiting.id)
            except SinkFailed as exc:
                self._fail(str(exc), exc)
            except Exception as exc:  # noqa: BLE001 - a bug in a sink must not be the end of its line
                self._fail(type(exc).__name__, exc)
            else:
                self._work()
                self._remove(waiting)
                return
            if self._clock() - waiting.since_s > GIVE_UP_S:
                self._count("dropped")
                self._remove(waiting)
                return
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    def _remove(self, waiting: Waiting) -> None:
        if waiting in self._line:
            self._line.remove(waiting)

    def _fail(self, reason: str, exc: Exception) -> None:
        self._count("failed")
        if not self._failing:
            log.error(
                "alerts cannot be sent",
                action="alert_failed",
                sink=self.name,
                reason=reason,
                where=where_it_broke(exc),
            )
        self._failing = True

    def _work(self) -> None:
        self._count("sent")
        if self._failing:
            log.info("alerts can be sent again", action="alert_sent", sink=self.name)
        self._failing = False

    def _count(self, outcome: str) -> None:
        metrics.ALERTS.labels(self.name, outcome).inc()


class Deliveries:
    """All sinks' lines."""

    def __init__(self, places: Sequence[Place]) -> None:
        self._lines = [Delivery(place) for place in places]

    def take(self, notifications: Sequence[Notification]) -> None:
        """Hand them to every sink. Returns at once."""
        for notification in notifications:
            for line in self._lines:
                line.take(notification)

    def beat(self, gateway: str, since: float) -> None:
        """Heartbeats, where they are due."""
        for line in self._lines:
            line.beat(gateway, since)

    async def keep(self) -> None:
        """Send, until it is cancelled."""
        async with asyncio.TaskGroup() as group:
            for line in self._lines:
                group.create_task(line.keep(), name=f"alerts to {line.name}")


def heartbeat(gateway: str, since: float, every_s: float) -> Notification:
    """Of one gateway: it lives, looks at its rules, and reaches this sink."""
    labels = {"alertname": WATCHDOG, "severity": "info", "gateway": gateway}
    alert = {
        "labels": labels,
        "annotations": {"summary": "Pericarp watches. That this stops coming is the alarm."},
        "startsAt": stamp(since),
        "endsAt": stamp(time.time() + BEATS * every_s),
        "generatorURL": "",
        "fingerprint": fingerprint(labels),
        "status": "firing",
    }
    return Notification({"alertname": WATCHDOG}, (alert,), firing=1, resolved=0, severity="info")
