"""From finished requests and metrics to alerts, to sinks, and, where a rule says so, to a key that is refused for a while.

`observe` is called once for each request, on its way out: it looks, and waits for nothing. All else goes on beside the
requests, and what needs the database apart from what does not: an outage of it must not keep anybody from being told.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from typing import TYPE_CHECKING
from uuid import uuid4

from service.watch import metrics
from service.watch.alerts import Alert, Alerts, Matcher, Silence
from service.watch.anomalies import Anomalies, Limits, Observation
from service.watch.conditions import Conditions
from service.watch.delivery import Deliveries
from service.watch.logs import get_logger, where_it_broke
from service.watch.rules import SEVERITIES, read_rules
from service.watch.sinks import LogSink, Place, build_sinks
from tenants.audit import MICRO, Decision
from tenants.errors import DatabaseUnavailable, KeyNotFound
from tenants.key_rights import read_networks

if TYPE_CHECKING:
    from service.asks import Exchange
    from service.containment import Switch
    from service.desk import Desk
    from service.settings import Settings
    from service.watch.rules import Configured
    from tenants.silences import Silences
    from tenants.told_alerts import ToldAlerts

LOOK_EVERY_S = 1.0
SPEAK_EVERY_S = 2.0
"""How late a silence, or the end of a suspension, may be."""
TELL_EVERY_S = 30.0
"""How often what fires is written again, so that it counts."""
CONDITIONS_EVERY_S = 5.0
MOST_SUSPENSIONS, PER_S = 10, 3_600.0
"""A rule that is wrong must not be the end of every key."""
TELL_FAILURES_EVERY_S = 60.0

log = get_logger(__name__)


class Alerting:
    """One for each gateway, in its event loop."""

    def __init__(
        self,
        configured: Configured,
        limits: Limits,
        places: tuple[Place, ...],
        *,
        silences: Silences,
        told: ToldAlerts,
        switch: Switch,
    ) -> None:
        self.gateway = uuid4()
        """What the command line calls this gateway's alerts; another one after each start."""
        self._began = time.time()
        self._anomalies = Anomalies(limits)
        self._alerts = Alerts(configured.rules, configured.routing, clock=time.monotonic, wall=time.time)
        self._conditions = Conditions(configured.rules, self._alerts, clock=time.monotonic)
        self._deliveries = Deliveries((Place(LogSink()), *places))
        self._kept_silences = silences
        self._silences: tuple[Silence, ...] = ()
        self._told = told
        self._told_last: tuple[float, frozenset[str]] = (float("-inf"), frozenset())
        self._switch = switch
        self._suspended_s: deque[float] = deque()
        self._failure_told_s = float("-inf")

    def observe(self, exchange: Exchange, status: int) -> None:
        """Look at a finished request. Never raises: what is odd here is no reason to keep an answer back."""
        try:
            for anomaly in self._anomalies.observe(_observation(exchange, status)):
                metrics.ANOMALIES.labels(anomaly.name).inc()
                self._alerts.raise_anomaly(anomaly)
        except Exception as exc:  # noqa: BLE001 - whatever it was, the request is answered; it is counted and told
            metrics.OBSERVATION_FAILURES.inc()
            now_s = time.monotonic()
            if now_s - self._failure_told_s >= TELL_FAILURES_EVERY_S:
                self._failure_told_s = now_s
                log.error(
                    "a request could not be looked at",
                    action="observation_failed",
                    error=type(exc).__name__,
                    where=where_it_broke(exc),
                )

    async def keep(self) -> None:
        """Watch, send, and do what needs the database, until it is cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._deliveries.keep(), name="alert deliveries")
            group.create_task(self._watch(), name="alert rules")
            group.create_task(self._speak(), name="alert silences")

    async def _watch(self) -> None:
        looked_s = float("-inf")
        while True:
            now_s = time.monotonic()
            if now_s - looked_s >= CONDITIONS_EVERY_S:
                looked_s = now_s
                self._conditions.look()
            self._deliveries.take(self._alerts.tick(self._silences))
            self._deliveries.beat(str(self.gateway), self._began)
            firing = [alert.rule.severity for alert in self._alerts.firing]
            for severity in SEVERITIES:
                metrics.ALERTS_FIRING.labels(severity).set(firing.count(severity))
            await asyncio.sleep(LOOK_EVERY_S)

    async def _speak(self) -> None:
        while True:
            try:
                await self.refresh_silences()
                await self._suspend()
                await self._resume()
                await self._tell()
            except DatabaseUnavailable:
                pass  # what was known stands; the next turn does what this one could not
            await asyncio.sleep(SPEAK_EVERY_S)

    async def refresh_silences(self) -> None:
        """Know what is silenced now. Raises `DatabaseUnavailable`."""
        self._silences = tuple(
            Silence(str(each.id), tuple(map(Matcher.parse, each.matchers)))
            for each in await self._kept_silences.list_open()
        )

    async def _suspend(self) -> None:
        """Refuse the keys that rules say so of, unless the alert is silenced."""
        while (alert := self._alerts.next_suspension()) is not None:
            if any(silence.matches(alert.labels) for silence in self._silences):
                self._alerts.suspended(alert)
                continue
            if self._is_spent():
                self._alerts.suspended(alert)
                log.error(
                    "a rule suspends too many keys, so this one is left",
                    action="suspension_withheld",
                    rule=alert.rule.name,
                    key=alert.contains[1] if alert.contains else "",
                )
                continue
            await self._suspend_key(alert)  # raises where the database is away; then it is the next one again
            self._alerts.suspended(alert)

    async def _suspend_key(self, alert: Alert) -> None:
        assert alert.contains is not None and alert.rule.contain_s is not None, (
            "it is of a key, and says how long"
        )
        tenant, key_id = alert.contains
        try:
            key = await self._switch.suspend_key(
                tenant, key_id, lasts_s=alert.rule.contain_s, rule=alert.rule.name
            )
        except KeyNotFound:  # a token's or a certificate's name is no key
            key = None
        if key is None:
            log.warning(
                "a key cannot be suspended", action="suspension_withheld", rule=alert.rule.name, key=key_id
            )
            return
        self._suspended_s.append(time.monotonic())
        log.warning(
            "suspended a key",
            action="key_suspended",
            tenant=str(tenant),
            key=key_id,
            rule=alert.rule.name,
            lasts_s=alert.rule.contain_s,
        )

    def _is_spent(self) -> bool:
        while self._suspended_s and time.monotonic() - self._suspended_s[0] > PER_S:
            self._suspended_s.popleft()
        return len(self._suspended_s) >= MOST_SUSPENSIONS

    async def _resume(self) -> None:
        resumed = await self._switch.resume_due()
        if resumed:
            log.info("suspended keys are let in again", action="key_resumed", count=resumed)

    async def _tell(self) -> None:
        """Write what fires, where that has changed or was written long ago."""
        firing = self._alerts.firing
        names = frozenset(f"{alert.fingerprint}{alert.silenced_by}" for alert in firing)
        told_s, told = self._told_last
        now_s = time.monotonic()
        if names == told and (not names or now_s - told_s < TELL_EVERY_S):
            return
        until = time.time() + TELL_EVERY_S
        await self._told.tell(
            self.gateway, [{**alert.tell(until), "silencedBy": list(alert.silenced_by)} for alert in firing]
        )
        self._told_last = (now_s, names)


def build_alerting(settings: Settings, desk: Desk) -> Alerting:
    """As the settings say. Raises `InvalidAlerts` with every fault of the file of alerts."""
    configured = read_rules(settings.alerts)
    return Alerting(
        configured,
        Limits(
            key_per_minute=settings.anomaly_key_per_minute,
            stranger_per_minute=settings.anomaly_stranger_per_minute,
            allowed=tuple(read_networks(settings.anomaly_allowed)),
            clients=settings.anomaly_clients,
        ),
        build_sinks(configured.sinks),
        silences=desk.silences,
        told=desk.told_alerts,
        switch=desk.switch,
    )


def _observation(exchange: Exchange, status: int) -> Observation:
    """What is known of a request: from its entry of the log, which holds no input."""
    caller, entry = exchange.caller, exchange.entry
    seen = Observation(address=exchange.client_address, user_agent=exchange.user_agent, status=status)
    if caller is None:
        return seen
    seen.tenant, seen.tenant_id, seen.key_id = caller.tenant_name, caller.tenant, caller.key_id
    seen.most_per_minute = caller.policy.anomaly_requests_per_minute
    if entry is None:
        return seen
    details = entry.details
    seen.session = entry.session
    seen.end_user = str(details.get("subject") or details.get("end_user") or "")
    seen.refused = entry.decision in (Decision.REFUSED, Decision.DENIED)
    seen.query = exchange.query or ""
    if entry.places:
        seen.score = entry.places[0][1] / MICRO
    screening = details.get("screening")
    if isinstance(screening, dict):
        for measured in screening.get("risks", {}).values():
            for category, (score, _threshold) in measured.items():
                if score / MICRO > seen.risk:
                    seen.risk, seen.category = score / MICRO, category
    return seen
