"""Which trace a request belongs to: W3C Trace Context, https://www.w3.org/TR/trace-context-1/, section 3.2.

A trace id is 32 lower-case hexadecimal digits, not all zero. A caller's is taken where its header is valid; it ties our
lines to its own, and nothing else is believed of it.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence

TRACEPARENT = re.compile(
    r"(?!ff)([0-9a-f]{2})-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(-.*)?"
)


def read_trace_id(traceparent: Sequence[str]) -> str:
    """The trace id of the `traceparent` headers of a request; a new one where there is none, several, or an invalid one."""
    if len(traceparent) == 1 and (found := TRACEPARENT.fullmatch(traceparent[0].strip(" \t"))) is not None:
        version, trace_id, more = found.groups()
        if version != "00" or more is None:  # what a later version appends, it may; this one has nothing more
            return trace_id
    return secrets.token_hex(16)
