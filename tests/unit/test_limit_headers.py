"""`RateLimit-Policy` and `RateLimit` are lists that a strict parser of structured fields (RFC 9651) takes."""

from __future__ import annotations

from typing import Any

import http_sf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from service.api.limits import limit_headers
from tenants.limits import KEY_NAMES, NAMES, Standing

counts = st.integers(0, 1_000_000_000_000)
standings = st.lists(
    st.builds(
        Standing,
        name=st.sampled_from([*NAMES, *KEY_NAMES, "sessions"]),
        limit=counts,
        window_s=st.none() | st.integers(1, 31 * 86_400),
        remaining=counts,
        more_in_s=counts,
        per_window=counts,
        shadow=st.booleans(),
    ),
    max_size=5,
)


def parsed(field: str) -> list[tuple[str, dict[str, Any]]]:
    items: Any = http_sf.parse(field.encode(), tltype="list")
    assert http_sf.ser(items) == field, "as it would be written by the parser's own hand"
    for name, _ in items:
        assert type(name) is str, "a string, not a token"
    return list(items)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(standings)
def test_whatever_stands_where_is_a_valid_list(told: list[Standing]) -> None:
    headers = limit_headers(told)
    shown = [standing for standing in told if not standing.shadow]
    if not shown:
        assert headers == {}
        return
    policies, states = parsed(headers["RateLimit-Policy"]), parsed(headers["RateLimit"])
    assert [name for name, _ in policies] == [name for name, _ in states] == [each.name for each in shown]
    for standing, (_, policy), (_, state) in zip(shown, policies, states, strict=True):
        assert policy["q"] == standing.per_window
        assert policy.get("w") == standing.window_s
        assert policy.get("pericarp-burst", standing.per_window) == standing.limit
        assert state["r"] == standing.remaining
        assert state.get("t", 0) == standing.more_in_s
        assert set(policy) <= {"q", "w", "qu", "pericarp-burst"} and set(state) <= {"r", "t"}


def test_units_are_named_as_the_draft_names_them() -> None:
    told = [Standing(name, 5, None, 4, 0, 5) for name in (*NAMES, *KEY_NAMES)]
    units = {name: policy.get("qu") for name, policy in parsed(limit_headers(told)["RateLimit-Policy"])}
    assert units["concurrency"] == units["key_concurrency"] == "concurrent-requests"
    assert units["requests"] is units["requests_month"] is units["key_requests"] is None
    assert units["tokens"] == units["key_tokens_month"] == "tokens"
    assert units["images"] == "images"


def test_a_burst_is_told_where_it_differs() -> None:
    told = (Standing("requests", 10, 60, 3, 2, 600), Standing("concurrency", 5, None, 4, 0, 5))
    assert limit_headers(told) == {
        "RateLimit-Policy": '"requests";q=600;w=60;pericarp-burst=10, "concurrency";q=5;qu="concurrent-requests"',
        "RateLimit": '"requests";r=3;t=2, "concurrency";r=4',
    }
