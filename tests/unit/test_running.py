"""What one tenant may have under way at a gateway, and that another's share is another's."""

from __future__ import annotations

from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import pytest

from service.asks import Exchange, Running
from service.errors import Overloaded


def exchange(number: int, tenant: str) -> Exchange:
    caller: Any = SimpleNamespace(tenant=tenant)
    return Exchange(f"request-{number}", "203.0.113.9", "rerank", caller=caller)


def test_a_tenants_requests_are_counted_and_leave_room_for_anothers() -> None:
    running = Running(most_requests=2, most_body_bytes=100)
    with ExitStack() as held:
        for number in range(2):
            held.enter_context(running.under_way(exchange(number, "acme")))
        with pytest.raises(Overloaded) as refused, running.under_way(exchange(3, "acme")):
            pass
        assert refused.value.reason == "tenant_requests"
        held.enter_context(running.under_way(exchange(4, "beta")))
        assert len(running.all()) == 3
    assert running.all() == ()
    with running.under_way(exchange(5, "acme")):
        pass


def test_bytes_of_bodies_are_counted_together_and_given_back() -> None:
    running = Running(most_requests=9, most_body_bytes=100)
    with ExitStack() as held:
        first = held.enter_context(running.under_way(exchange(1, "acme")))
        first(60)
        with running.under_way(exchange(2, "acme")) as second:
            second(40)
            with pytest.raises(Overloaded) as refused:
                first(1)
            assert refused.value.reason == "tenant_bodies"
        first(40)
        other = held.enter_context(running.under_way(exchange(3, "beta")))
        other(100)
    with running.under_way(exchange(4, "acme")) as again:
        again(100)
