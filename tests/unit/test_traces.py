"""A request's trace is its caller's where that is one by W3C Trace Context, and else a new one."""

from __future__ import annotations

import re

import pytest

from service.watch.traces import read_trace_id

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = "00f067aa0ba902b7"


@pytest.mark.parametrize(
    "header", [f"00-{TRACE}-{PARENT}-01", f" 00-{TRACE}-{PARENT}-00\t", f"cc-{TRACE}-{PARENT}-01-what-comes"]
)
def test_a_valid_trace_goes_on(header: str) -> None:
    assert read_trace_id([header]) == TRACE


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [""],
        [f"00-{TRACE}-{PARENT}-01"] * 2,
        [f"ff-{TRACE}-{PARENT}-01"],
        [f"00-{'0' * 32}-{PARENT}-01"],
        [f"00-{TRACE}-{'0' * 16}-01"],
        [f"00-{TRACE.upper()}-{PARENT}-01"],
        [f"00-{TRACE}-{PARENT}-01-more"],
        [f"cc-{TRACE}-{PARENT}-01more"],
        [f"00-{TRACE}-{PARENT}"],
        [f"00-{TRACE[:-1]}x-{PARENT}-01"],
        [f"00-{TRACE}-{PARENT}-01\n"],
    ],
)
def test_an_invalid_one_is_replaced(headers: list[str]) -> None:
    made = read_trace_id(headers)
    assert re.fullmatch(r"[0-9a-f]{32}", made) and made != TRACE
    assert read_trace_id(headers) != made
