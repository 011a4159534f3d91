"""How soon an anomaly is found in a replayed day, how often one is found that is none, and what looking costs.

A part of `bench/operations.py`. No clock is waited for: a day of requests of nine keys
(quiet, with a day and a night, and bursty: a negative binomial whose variance is its mean and half its square) goes through
`service.watch.anomalies` with the limits that are shipped, and each anomaly is put in once an hour of the last twelve, by
a key of its own kind. `delay_s` is from its first request to the first alert, `confirmed_s` to the first that is for a page.

The table `rates` is of the rate alone, without the least number a minute below which nothing is odd.

    python bench/operations_anomalies.py [--quick]
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import json
import math
import random
import statistics
import sys
import time
import tracemalloc
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from service.alerting import _observation  # noqa: E402
from service.asks import Exchange  # noqa: E402
from service.watch.anomalies import (  # noqa: E402
    ADDRESSES_KEPT,
    DRIFT,
    NETWORK,
    PROBING,
    RATE,
    REFUSALS,
    RISK,
    Anomalies,
    Limits,
    Observation,
)
from service.watch.baselines import BUCKET_S, LEARNING, Finding, Rate  # noqa: E402
from tenants.access import Caller, Role, TenantId  # noqa: E402
from tenants.audit import Decision, Entry, ItemPrint  # noqa: E402
from tenants.policy import Policy  # noqa: E402

DAY_S = 86_400
BUCKETS = int(DAY_S / BUCKET_S)
KINDS = ("quiet", "diurnal", "bursty")
PER_S = (0.02, 0.2, 0.8)
STEP = 5
HOURS, QUICK_HOURS = tuple(range(12, 24)), (3, 4)
"""When anomalies are put in, after so many hours of the day; a quick day ends an hour after the last."""
AFTERMATH_S = 3 * 3_600
"""After an attack on a key, what is odd of it is no false alarm yet: windows of scores that it has filled are still open."""
HOME, AWAY = "198.51.100.7", "203.0.113.9"
_LETTERS = random.Random(17)
WORDS = ["".join(_LETTERS.choices("etaoinshrdlucmfwypvbg", k=_LETTERS.randint(2, 9))) for _ in range(2_000)]
POPULAR = list(itertools.accumulate(1 / (rank + 10) for rank in range(len(WORDS))))
"""By Zipf's law."""


@dataclass(frozen=True, slots=True)
class Event:
    """One request at its second; `attack` names what it belongs to, where it is no ordinary one."""

    at_s: float
    key: str
    seen: Observation
    attack: str = ""


def counts_of(kind: str, per_s: float, buckets: int, rng: np.random.Generator) -> np.ndarray:
    """Requests in each bucket."""
    mean = per_s * BUCKET_S * np.ones(buckets)
    if kind != "quiet":
        mean *= 1 + 0.8 * np.sin(2 * np.pi * np.arange(buckets) / BUCKETS)
    if kind == "bursty":
        mean = mean * rng.gamma(2, 0.5, buckets)
    return rng.poisson(mean)


def ordinary(key: str, kind: str, per_s: float, buckets: int, seed: int) -> Iterator[Event]:
    """A key's day: one request in twenty is refused, queries are of six words, scores of one distribution."""
    chance = random.Random(seed)
    for bucket, count in enumerate(counts_of(kind, per_s, buckets, np.random.default_rng(seed))):
        for at_s in sorted(chance.uniform(bucket, bucket + 1) * BUCKET_S for _ in range(count)):
            yield Event(at_s, key, request(key, chance))


def request(key: str, chance: random.Random, **fields: Any) -> Observation:
    seen = Observation(
        address=HOME,
        user_agent=f"agent-{chance.randrange(3)}",
        tenant=key,
        key_id=key,
        end_user=f"user-{chance.randrange(40)}",
        refused=chance.random() < 0.05,
        risk=min(0.79, chance.betavariate(1, 12)),
        score=chance.betavariate(2, 4),
        query=" ".join(chance.choices(WORDS, cum_weights=POPULAR, k=5)),
    )
    for name, value in fields.items():
        setattr(seen, name, value)
    return seen


def attacks(hours: Sequence[int]) -> Iterator[Event]:
    """Each kind once an hour, of keys that are otherwise as ordinary as the others."""
    chance = random.Random(99)

    def probe() -> str:
        text = list("how is a thing that nobody may do done at home")
        text[chance.randrange(len(text))] = chance.choice("xyz0")
        return "".join(text)

    makers: dict[str, tuple[float, float, Callable[[str, int], Observation]]] = {
        # requests a second, seconds, and one request
        f"{RATE} of a key": (10.0, 60.0, lambda key, _: request(key, chance)),
        f"{RATE} of a stranger": (1.0, 60.0, lambda _, __: Observation(address=AWAY, status=401)),
        f"{RATE} of a session": (
            4.0,
            60.0,
            lambda key, number: request(key, chance, session=f"ses_{number}"),
        ),
        RISK: (0.2, 30.0, lambda key, _: request(key, chance, risk=0.95, category="hate")),
        REFUSALS: (1.0, 120.0, lambda key, _: request(key, chance, refused=True)),
        NETWORK: (0.2, 30.0, lambda key, _: request(key, chance, address=AWAY)),
        PROBING: (1.5, 120.0, lambda key, _: request(key, chance, query=probe())),
        DRIFT: (2.0, 1_500.0, lambda key, _: request(key, chance, score=chance.betavariate(6, 2))),
    }
    for number, hour in enumerate(hours):
        for name, (per_s, lasts_s, make) in makers.items():
            # A network is new to a key once, and a shifted reference takes a day to come back: a key of its own each time.
            key = f"{name} {number}" if name in (NETWORK, DRIFT) else name
            for place in range(int(per_s * lasts_s)):
                yield Event(hour * 3_600 + 60 + place / per_s, key, make(key, number), f"{name} {number}")


def background(hours: Sequence[int], buckets: int) -> Iterator[Iterator[Event]]:
    """The ordinary traffic of the attacked keys."""
    for number, name in enumerate((f"{RATE} of a key", RISK, REFUSALS, PROBING)):
        yield ordinary(name, "diurnal", 0.1, buckets, 500 + number)
    yield ordinary(f"{RATE} of a session", "diurnal", 3.0, buckets, 510)
    for number in range(len(hours)):
        yield ordinary(f"{NETWORK} {number}", "quiet", 0.05, buckets, 520 + number)
        yield ordinary(f"{DRIFT} {number}", "quiet", 0.2, buckets, 540 + number)


def replay(quick: bool) -> dict[str, Any]:
    """A day through the shipped limits."""
    now = [0.0]
    anomalies = Anomalies(Limits(), clock=lambda: now[0])
    hours = QUICK_HOURS if quick else HOURS
    buckets = int((hours[-1] + 1) * 3_600 / BUCKET_S)
    streams = [
        ordinary(f"{kind} {per_s:g}/s", kind, per_s, buckets, seed)
        for seed, (kind, per_s) in enumerate((kind, per_s) for kind in KINDS for per_s in PER_S)
    ]
    attacking = sorted(attacks(hours), key=lambda event: event.at_s)
    began: dict[str, float] = {}
    found: dict[tuple[str, bool], float] = {}
    false: Counter[tuple[str, str, bool]] = Counter()
    over: dict[str, float] = {}
    observed = 0
    for event in heapq.merge(*streams, *background(hours, buckets), attacking, key=lambda event: event.at_s):
        now[0] = event.at_s
        told = anomalies.observe(event.seen)
        observed += 1
        if event.attack:
            began.setdefault(event.attack, event.at_s)
            over[event.key] = event.at_s + AFTERMATH_S
        for anomaly in told:
            if event.attack.startswith(anomaly.name):
                for confirmed in {False, anomaly.confirmed}:
                    found.setdefault((event.attack, confirmed), event.at_s)
            elif not event.attack and event.at_s > over.get(event.key, 0.0):
                false[event.key, anomaly.name, anomaly.confirmed] += 1
    return {
        "hours": hours[-1] + 1,
        "requests": observed,
        "found": _delays(began, found),
        "false": {
            f"{key}: {name}{', confirmed' if confirmed else ''}": count
            for (key, name, confirmed), count in sorted(false.items())
        },
        "false_confirmed": sum(count for (*_, confirmed), count in false.items() if confirmed),
        "false_warnings": sum(count for (*_, confirmed), count in false.items() if not confirmed),
    }


def _delays(began: dict[str, float], found: dict[tuple[str, bool], float]) -> list[dict[str, Any]]:
    rows = []
    for name in dict.fromkeys(attack.rpartition(" ")[0] for attack in began):
        mine = [attack for attack in began if attack.rpartition(" ")[0] == name]
        first = [found[each, False] - began[each] for each in mine if (each, False) in found]
        sure = [found[each, True] - began[each] for each in mine if (each, True) in found]
        rows.append(
            {
                "anomaly": name,
                "put_in": len(mine),
                "found": len(first),
                "delay_s": round(statistics.median(first), 1) if first else None,
                "longest_s": round(max(first), 1) if first else None,
                "confirmed_s": round(statistics.median(sure), 1) if sure else None,
            }
        )
    return rows


def rates(days: int, steps: int) -> list[dict[str, Any]]:
    """The rate alone: false findings a day, and buckets until a step of five is found and confirmed."""
    rows = []
    for kind in KINDS:
        for per_s in (0.05, 0.5, 5.0, 20.0):
            rng = np.random.default_rng(1)
            counts = counts_of(kind, per_s, days * BUCKETS, rng)
            alone = _play(counts)
            first, sure = [], []
            for step in range(steps):
                begin = 3_000 + step * (len(counts) - 3_100) // steps
                stepped = counts[begin - 3_000 : begin + 60].copy()
                stepped[3_000:] *= STEP
                played = [(bucket - 2_999, finding) for bucket, finding in _play(stepped) if bucket >= 3_000]
                first.append(next((bucket for bucket, _ in played), math.inf))
                sure.append(next((at for at, finding in played if finding is Finding.CONFIRMED), math.inf))
            rows.append(
                {
                    "traffic": kind,
                    "per_s": per_s,
                    "odd_a_day": round(sum(each[1] is Finding.ODD for each in alone) / days, 2),
                    "confirmed_a_day": round(sum(each[1] is Finding.CONFIRMED for each in alone) / days, 2),
                    "buckets_to_odd": _median(first),
                    "buckets_to_confirmed": _median(sure),
                    "missed": sum(map(math.isinf, first)),
                    "not_confirmed": sum(map(math.isinf, sure)),
                    "steps": steps,
                }
            )
    return rows


def _median(buckets: list[float]) -> float | None:
    found = statistics.median(buckets)
    return None if math.isinf(found) else found


def _play(counts: np.ndarray) -> list[tuple[int, Finding]]:
    """What is found in these buckets, each being whole at once."""
    rate, found = Rate(), []
    for bucket, count in enumerate(counts.tolist()):
        if not count:
            continue
        finding = rate.note(bucket * BUCKET_S, 1, times=count)
        if finding and bucket >= LEARNING:
            found.append((bucket, finding))
    return found


def cost(quick: bool) -> dict[str, Any]:
    """All that a finished request costs: from its exchange to what is odd of it, with the sketch of its query."""
    anomalies = Anomalies(Limits())
    callers = [
        Caller(
            TenantId(uuid.UUID(int=number + 1)), f"tenant-{number}", f"key{number:09d}", Role.SEARCH, Policy()
        )
        for number in range(50)
    ]
    chance = random.Random(3)
    exchanges = []
    for number in range(2_000):
        caller = chance.choice(callers)
        exchange = Exchange(str(uuid.UUID(int=number)), f"203.0.113.{number % 200}", "rerank", caller=caller)
        exchange.query = " ".join(chance.choices(WORDS, cum_weights=POPULAR, k=8))
        exchange.entry = Entry(
            exchange.request_id,
            caller.tenant,
            caller.key_id,
            caller.role,
            "rerank",
            Decision.ANSWERED,
            "ok",
            200,
            query=ItemPrint("x" * 43, 40),
            places=tuple((place, 900_000 - place) for place in range(100)),
            details={
                "end_user": f"user-{number % 40}",
                "screening": {"action": "allow", "risks": {"text": {"hate": [120_000, 600_000]}}},
            },
        )
        exchanges.append(exchange)
    rounds = []
    for _ in range(15 if quick else 60):
        start = time.process_time()
        for exchange in exchanges:
            anomalies.observe(_observation(exchange, 200))
        rounds.append((time.process_time() - start) / len(exchanges))
    start = time.process_time()
    for _ in range(200_000):
        pass
    return {
        "us_a_request": round(1e6 * statistics.median(rounds), 1),
        "least_us": round(1e6 * min(rounds), 1),
        "ns_a_turn_of_an_empty_loop": round(1e9 * (time.process_time() - start) / 200_000, 1),
    }


def memory(clients: int) -> dict[str, Any]:
    """What is held once every table is full, and that it grows no more."""
    tracemalloc.start()
    anomalies = Anomalies(Limits(clients=clients), clock=lambda: 1_000.0)

    def fill(first: int, times: int) -> float:
        for number in range(first, first + clients):
            for _ in range(times):
                anomalies.observe(
                    Observation(
                        address=f"10.{number >> 16 & 255}.{number >> 8 & 255}.{number & 255}",
                        tenant=f"t{number}",
                        key_id=f"key{number:09d}",
                        end_user=f"user-{number}",
                        refused=True,
                        score=0.5,
                        query=f"{number} is what is asked",
                    )
                )
            anomalies.observe(Observation(address=f"2001:db8:{number & 65_535:x}::1", status=401))
        return tracemalloc.get_traced_memory()[0] / 2**20

    for number in range(ADDRESSES_KEPT):  # what is known of addresses is full first
        anomalies.observe(Observation(address=f"192.0.{number >> 8}.{number & 255}"))
    full, again = fill(0, 18), fill(clients, 18)
    tracemalloc.stop()
    return {
        "states": anomalies.states,
        "full_mib": round(full, 1),
        "after_as_many_others_mib": round(again, 1),
    }


def measure(quick: bool) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Figures of anomalies, and the aims that they are held against."""
    day = replay(quick)
    table = rates(4 if quick else 14, 3 if quick else 40)
    spent = cost(quick)
    held = memory(1_500 if quick else 10_000)
    figures = {"day": day, "rates": table, "observation": spent, "memory": held}
    found = day["found"]
    missed = sum(row["put_in"] - row["found"] for row in found)
    slow = max(
        math.inf if row["delay_s"] is None else row["delay_s"] for row in found if row["anomaly"] != DRIFT
    )
    quiet, bursty = ([row for row in table if (row["traffic"] == "bursty") is odd] for odd in (False, True))
    steps = [row for row in table if row["per_s"] >= 0.5]

    def aim(what: str, limit: float, measured: float) -> dict[str, Any]:
        return {"what": what, "aim": f"<= {limit:g}", "measured": round(measured, 3), "ok": measured <= limit}

    return figures, [
        aim("a finished request, its query sketched, us of a core", 20, spent["least_us"]),
        aim("anomalies of the replayed day that are missed", 0, missed),
        aim("slowest median delay of an anomaly but drift, s", 60, slow),
        aim("false alarms of the replayed day that are for a page", 0, day["false_confirmed"]),
        aim("quiet and diurnal rates: odd buckets a day", 0.2, max(row["odd_a_day"] for row in quiet)),
        aim("bursty rates: odd buckets a day", 8, max(row["odd_a_day"] for row in bursty)),
        aim("any rate: confirmed a day", 0.25, max(row["confirmed_a_day"] for row in table)),
        aim(
            "a step of five from 0.5/s on that is never found, of all",
            0.02,
            sum(row["missed"] for row in steps) / sum(row["steps"] for row in steps),
        ),
        aim(
            "memory after as many other clients, over full",
            1.05,
            held["after_as_many_others_mib"] / held["full_mib"],
        ),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="in less than 50 s")
    figures, aims = measure(parser.parse_args().quick)
    print(json.dumps({"figures": figures, "aims": aims}, indent=2))
    return 0 if all(aim["ok"] for aim in aims) else 1


if __name__ == "__main__":
    sys.exit(main())
