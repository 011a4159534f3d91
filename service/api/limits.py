"""Where a caller's limits stand, as response headers (draft-ietf-httpapi-ratelimit-headers-10; RFC 9651 lists).

    RateLimit-Policy: "requests";q=600;w=60, "images";q=20;w=60;qu="images", "concurrency";q=5;qu="concurrent-requests"
    RateLimit: "requests";r=599;t=1, "images";r=12;t=3, "concurrency";r=4

`q` comes back over `w` seconds; where another number fits at once, `pericarp-burst` says how many. Limits in shadow are
left out: nobody is to go slower because of them. No partition key: it would tell what it should not.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tenants.limits import Standing

UNITS = {"images": "images", "tokens": "tokens", "concurrency": "concurrent-requests", "sessions": "sessions"}
"""Quota units by the limit's name without `key_` and `_month`; the draft's default is `requests`."""


def limit_headers(standings: Iterable[Standing]) -> dict[str, str]:
    """The two headers; none where there is no limit to tell of."""
    told = [standing for standing in standings if not standing.shadow]
    if not told:
        return {}
    return {
        "RateLimit-Policy": ", ".join(map(_policy, told)),
        "RateLimit": ", ".join(map(_state, told)),
    }


def _policy(standing: Standing) -> str:
    item = f'"{standing.name}";q={standing.per_window}'
    if standing.window_s is not None:
        item += f";w={standing.window_s}"
    unit = UNITS.get(standing.name.removeprefix("key_").removesuffix("_month"))
    if unit is not None:
        item += f';qu="{unit}"'
    if standing.limit != standing.per_window:
        item += f";pericarp-burst={standing.limit}"
    return item


def _state(standing: Standing) -> str:
    item = f'"{standing.name}";r={standing.remaining}'
    return f"{item};t={standing.more_in_s}" if standing.more_in_s else item
