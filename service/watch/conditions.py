"""Rules about metrics, held against this gateway's own."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from service.watch.metrics import REGISTRY

if TYPE_CHECKING:
    from service.watch.alerts import Alerts
    from service.watch.rules import Condition, Rule


class Conditions:
    """Looks at the metrics that rules name. `clock`: seconds that never go back."""

    def __init__(self, rules: Sequence[Rule], alerts: Alerts, *, clock: Callable[[], float]) -> None:
        self._rules = [(rule, rule.condition) for rule in rules if rule.condition is not None]
        self._alerts = alerts
        self._clock = clock
        # A counter begins at 0 with its process, so its first growth is growth.
        self._past: dict[str, deque[tuple[float, float]]] = {
            rule.name: deque([(clock(), 0.0)]) for rule, _ in self._rules
        }

    def look(self) -> None:
        """Raise and end what holds and what does not."""
        values = self._read()
        for rule, condition in self._rules:
            value = values[rule.name]
            if condition.increase_s is not None:
                value = self._increase(rule.name, condition.increase_s, value)
            holds = value > condition.above if condition.above is not None else _is_below(condition, value)
            if holds:
                self._alerts.hold(rule, {}, {"value": f"{value:g}"})
            else:
                self._alerts.end(rule, {})

    def _read(self) -> dict[str, float]:
        """By rule the sum of the samples that it is about; 0 where there are none yet."""
        wanted = {condition.metric for _, condition in self._rules}
        sums = dict.fromkeys((rule.name for rule, _ in self._rules), 0.0)
        if not wanted:
            return sums
        for family in REGISTRY.restricted_registry(sorted(wanted)).collect():
            for sample in family.samples:
                for rule, condition in self._rules:
                    if sample.name == condition.metric and all(
                        sample.labels.get(name) == value for name, value in condition.match.items()
                    ):
                        sums[rule.name] += sample.value
        return sums

    def _increase(self, name: str, window_s: float, value: float) -> float:
        past, now_s = self._past[name], self._clock()
        past.append((now_s, value))
        while len(past) > 1 and past[1][0] <= now_s - window_s:
            past.popleft()
        return value - past[0][1]


def _is_below(condition: Condition, value: float) -> bool:
    return condition.below is not None and value < condition.below
