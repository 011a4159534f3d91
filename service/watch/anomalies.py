"""What is out of the ordinary in the requests of this gateway: one call for each that is finished, and what it shows.

In memory alone, and never more of it than `Limits.clients` says of each kind: who was not seen for longest is forgotten
first. Who shares an address is told apart by session, then by end user, then by user agent; an address counts by itself
only for those whom nobody knows. Nothing of a text is kept, no image, no key, and no address leaves this module: what is
told of one is its network.
"""

from __future__ import annotations

import ipaddress
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Generic, TypeVar

from service.watch.baselines import SIGMAS, Drift, Finding, Networks, Rate, Shapes, sketch

if TYPE_CHECKING:
    from tenants.access import TenantId

RATE, RISK, REFUSALS, NETWORK, PROBING, DRIFT = (
    "rate_anomaly",
    "risk_score",
    "refusal_rate",
    "new_network",
    "probing",
    "score_drift",
)
TOLD: Mapping[str, frozenset[str]] = {
    RATE: frozenset({"scope", "key", "session", "end_user", "network", "per_minute", "ordinary_per_minute"}),
    RISK: frozenset({"key", "category", "risk"}),
    REFUSALS: frozenset({"key", "refused_percent", "per_minute"}),
    NETWORK: frozenset({"key", "network"}),
    PROBING: frozenset({"key", "alike_percent", "per_minute"}),
    DRIFT: frozenset({"stability_index"}),
}
"""Each anomaly, and what it tells besides `tenant`."""

LEAST_REFUSED, REFUSED_SHARE = 20, 0.3
"""Refusals of a key in a minute, and their share of its requests, below which nothing is odd."""
LEAST_ALIKE, ALIKE_SHARE = 30, 0.5
"""Near-identical queries of a key in a minute, and their share of all."""
BUSY = LEAST_ALIKE / 2
"""Requests of a key in a minute from which on its queries are looked at."""
BUSIEST, EVERY = 240, 4
"""From so many on it is each fourth of them that is looked at, and counts for four."""
HISTORY_S, HISTORY_USES = 3_600.0, 50
"""What a key must have behind it before a network can be new to it."""

PREFIX = {4: 24, 6: 48}
ADDRESSES_KEPT = 4_096

State = TypeVar("State")
Net = ipaddress.IPv4Network | ipaddress.IPv6Network


@dataclass(frozen=True, slots=True)
class Limits:
    """From where on something may be odd."""

    key_per_minute: float = 100
    """Requests of a key, of a session, of an end user."""
    stranger_per_minute: float = 10
    """Refused requests of an address whose caller nobody knows."""
    risk: float = 0.8
    allowed: tuple[Net, ...] = ()
    """Networks whose addresses never count."""
    clients: int = 10_000
    """States of each kind that are kept at most."""


@dataclass(slots=True)
class Observation:
    """One finished request. Ids and numbers; what is not known of it stays empty."""

    address: str = ""
    user_agent: str = ""
    status: int = 200
    tenant: str = ""
    """Its name; empty: the caller is not known."""
    tenant_id: TenantId | None = None
    key_id: str = ""
    session: str = ""
    end_user: str = ""
    """A fingerprint."""
    refused: bool = False
    risk: float = 0.0
    category: str = ""
    score: float | None = None
    """The relevance of the answer's first place."""
    query: str = ""
    """Its text, which is sketched where the key is busy, and not kept."""
    most_per_minute: int | None = None
    """What the tenant's policy says is odd of a key in any case, where it does."""


@dataclass(frozen=True, slots=True)
class Anomaly:
    """Something odd. `labels` name it; `values` say how much."""

    name: str
    labels: Mapping[str, str]
    values: Mapping[str, float] = field(default_factory=dict)
    confirmed: bool = False
    """The second bucket of three, where it is about a rate."""
    tenant_id: TenantId | None = None
    key_id: str = ""


class Latest(Generic[State]):
    """States by what they are of, a fixed number of them."""

    def __init__(self, most: int, make: Callable[[], State]) -> None:
        self._most = most
        self._make = make
        self._states: OrderedDict[object, State] = OrderedDict()

    def __len__(self) -> int:
        return len(self._states)

    def __getitem__(self, which: object) -> State:
        """The state, a new one where there was none; it is the latest now."""
        state = self._states.get(which)
        if state is None:
            state = self._states[which] = self._make()
            if len(self._states) > self._most:
                self._states.popitem(last=False)
        else:
            self._states.move_to_end(which)
        return state


class Key:
    """What is known of one key."""

    __slots__ = ("alike", "networks", "rate", "refused", "shapes")

    def __init__(self, now_s: float) -> None:
        self.rate = Rate()
        self.refused = Rate()
        self.alike = Rate()
        self.shapes = Shapes()
        self.networks = Networks(now_s)


class Anomalies:
    """Looks at every request once. Belongs to one event loop. `clock`: seconds that never go back."""

    def __init__(self, limits: Limits, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits = limits
        self._clock = clock
        self._keys: Latest[Key] = Latest(limits.clients, lambda: Key(clock()))
        self._clients: Latest[Rate] = Latest(limits.clients, Rate)
        self._strangers: Latest[Rate] = Latest(limits.clients, Rate)
        self._tenants: Latest[Drift] = Latest(limits.clients, Drift)
        self._place = lru_cache(ADDRESSES_KEPT)(self._read_address)

    @property
    def states(self) -> int:
        """How many are kept."""
        return len(self._keys) + len(self._clients) + len(self._strangers) + len(self._tenants)

    def observe(self, seen: Observation) -> list[Anomaly]:
        """What this request shows. Each rate is told once a bucket."""
        now_s = self._clock()
        found: list[Anomaly] = []
        network, counts = self._place(seen.address)
        if not seen.tenant:
            if counts and 400 <= seen.status < 500:
                self._look_at_stranger(seen.address, network, now_s, found)
            return found
        key = self._keys[seen.tenant, seen.key_id]
        always_from = math.inf if seen.most_per_minute is None else seen.most_per_minute
        finding = key.rate.note(now_s, self._limits.key_per_minute, always_from=always_from)
        if finding:
            found.append(_of(seen, RATE, finding, _pace(key.rate), scope="key"))
        self._look_at_client(seen, network, counts, now_s, found)
        self._look_at_use(seen, key, network, counts, now_s, found)
        if seen.score is not None:
            drift = self._tenants[seen.tenant]
            if drift.note(seen.score):
                found.append(
                    Anomaly(
                        DRIFT,
                        {"tenant": seen.tenant},
                        {"stability_index": round(drift.index, 3)},
                        tenant_id=seen.tenant_id,
                    )
                )
        return found

    def _look_at_stranger(self, address: str, network: str, now_s: float, found: list[Anomaly]) -> None:
        rate = self._strangers[address]
        least = self._limits.stranger_per_minute
        finding = rate.note(now_s, least, always_from=least)  # to try keys is never ordinary
        if finding:
            labels = {"scope": "stranger", "network": network}
            found.append(Anomaly(RATE, labels, _pace(rate), finding is Finding.CONFIRMED))

    def _look_at_client(
        self, seen: Observation, network: str, counts: bool, now_s: float, found: list[Anomaly]
    ) -> None:
        """Who of the key's clients it is, as closely as the request says."""
        if seen.session:
            scope, who = "session", seen.session
        elif seen.end_user:
            scope, who = "end_user", seen.end_user
        elif counts:
            scope, who = "address", f"{seen.address} {seen.user_agent}"
        else:
            return
        rate = self._clients[seen.tenant, seen.key_id, scope, who]
        finding = rate.note(now_s, self._limits.key_per_minute)
        if finding:
            name, told = ("network", network) if scope == "address" else (scope, who)
            found.append(_of(seen, RATE, finding, _pace(rate), scope=scope, **{name: told}))

    def _look_at_use(
        self, seen: Observation, key: Key, network: str, counts: bool, now_s: float, found: list[Anomaly]
    ) -> None:
        """What the key is used for, and from where."""
        if seen.risk > self._limits.risk:
            found.append(_of(seen, RISK, Finding.ODD, {"risk": round(seen.risk, 2)}, category=seen.category))
        if seen.refused:
            key.refused.settle(key.rate)
            least = max(LEAST_REFUSED, REFUSED_SHARE * key.rate.minute)
            finding = key.refused.note(now_s, least, always_from=_beyond_share(key.refused, key.rate, least))
            share = key.refused.minute / key.rate.minute
            if finding:
                values = {"refused_percent": round(100 * share), "per_minute": key.refused.minute}
                found.append(_of(seen, REFUSALS, finding, values))
        if counts and network:
            networks = key.networks
            aged = now_s - networks.began_s >= HISTORY_S and networks.uses >= HISTORY_USES
            if networks.is_new(network) and aged:
                found.append(_of(seen, NETWORK, Finding.ODD, {}, network=network))
        minute = key.rate.minute
        times = 1 if minute < BUSIEST else EVERY
        looks = seen.query and minute >= BUSY and minute % times == 0
        if looks and key.shapes.has_alike(sketch(seen.query)):
            key.alike.settle(key.rate)
            least = max(LEAST_ALIKE, ALIKE_SHARE * minute)
            beyond = _beyond_share(key.alike, key.rate, least)
            finding = key.alike.note(now_s, least, times=times, always_from=beyond)
            share = key.alike.minute / minute
            if finding:
                values = {"alike_percent": round(100 * share), "per_minute": key.alike.minute}
                found.append(_of(seen, PROBING, finding, values))

    def _read_address(self, address: str) -> tuple[str, bool]:
        """Its network, and whether it counts: an allowed one does not, nor what is no address."""
        try:
            found = ipaddress.ip_address(address)
        except ValueError:
            return "", False
        if isinstance(found, ipaddress.IPv6Address) and found.ipv4_mapped is not None:
            found = found.ipv4_mapped
        network = str(ipaddress.ip_network((found, PREFIX[found.version]), strict=False))
        return network, not any(found in allowed for allowed in self._limits.allowed)


def _of(
    seen: Observation, name: str, finding: Finding, values: Mapping[str, float], **labels: str
) -> Anomaly:
    return Anomaly(
        name,
        {"tenant": seen.tenant, "key": seen.key_id, **labels},
        values,
        finding is Finding.CONFIRMED,
        seen.tenant_id,
        seen.key_id,
    )


def _beyond_share(part: Rate, whole: Rate, least: float) -> float:
    """From how many a minute on a part is more than chance makes of what its share of the whole was, and not below `least`."""
    if not part.is_known or not whole.is_known or not whole.mean:
        return math.inf
    share = min(part.mean / whole.mean, 1.0)
    chance = math.sqrt(whole.minute * share * (1 - share) + 1)
    return max(least, share * whole.minute + SIGMAS * chance)


def _pace(rate: Rate) -> dict[str, float]:
    return {"per_minute": rate.minute, "ordinary_per_minute": round(rate.mean * 6)}
