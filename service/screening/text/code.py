"""Patterns of SQL, HTML and paths as attacks have them. Scored low, because documentation is full of them.

Nothing here can run in a reranker; what could be harmed is whoever stores or shows a text later. So a score is 0.2
where code looks unusual and never above 0.4, whatever comes together.
"""

from __future__ import annotations

import re

from ahocorasick_rs import AhoCorasick

from service.screening.signals import Signal
from service.screening.text.views import Views
from tenants.risk import Category

DETECTOR = "code"
MOST = 0.4

_RULES: tuple[tuple[str, float, tuple[str, ...], re.Pattern[str]], ...] = (
    (
        "sql",
        0.4,
        (
            *(
                f"{quote}{gap}{word}"
                for quote in "'\")"
                for gap in ("", " ")
                for word in ("or ", "and ", "or(")
            ),
            "union",
            "sleep(",
            "benchmark(",
            "xp_cmdshell",
            "waitfor",
        ),
        re.compile(
            r"['\"]\s{0,4}\)?\s{0,4}(?:or|and)\s{1,4}['\"(]?\s{0,2}(?:\d{1,9}|[a-z]{1,9})['\"]?\s{0,4}=\s{0,4}['\"(]?(?:\d{1,9}|[a-z]{1,9})"
            r"|\bunion\s{1,4}(?:all\s{1,4})?select\b|\b(?:sleep|benchmark|pg_sleep)\(\d|\bxp_cmdshell\b|\bwaitfor\s{1,4}delay\b"
        ),
    ),
    (
        "sql",
        0.2,
        (
            ";drop",
            "; drop",
            ";delete",
            "; delete",
            ";truncate",
            "; truncate",
            "; insert",
            "; update",
            "'--",
            "' --",
        ),
        re.compile(
            r"['\"]?\s{0,4};\s{0,4}(?:drop|delete|truncate|insert|update)\s{1,4}(?:table|from|into|database|[a-z_]{1,32}\s{1,4}set)\b"
            r"|\w'\s{0,2}--(?:\s|$)"
        ),
    ),
    (
        "html",
        0.4,
        (
            "<script",
            "javascript:",
            "onerror",
            "onload",
            "onclick",
            "onmouse",
            "srcdoc",
            "<iframe",
            "data:text/html",
        ),
        re.compile(
            r"<script\b[^>]{0,200}>|\bjavascript:\s{0,4}\w|<[a-z]{1,16}\b[^>]{0,200}\bon(?:error|load|click|mouse\w{1,8})\s{0,4}="
            r"|<iframe\b|\bsrcdoc\s{0,2}=|data:text/html"
        ),
    ),
    (
        "path",
        0.3,
        ("../", "..\\", "/etc/", "%2e%2e", "..%2f", "c:\\windows", "/proc/self", "file://"),
        re.compile(
            r"(?:\.\./){3}|(?:\.\.\\){3}|(?:%2e%2e(?:%2f|/)){2}|/etc/(?:passwd|shadow)\b|/proc/self/|\bfile:///etc"
        ),
    ),
    (
        "shell",
        0.3,
        ("rm -rf", "curl ", "wget ", "$(", "/bin/sh", "/dev/tcp", "${jndi", "{{"),
        re.compile(
            r"[;&|]\s{0,3}rm\s{1,3}-rf\s{1,3}[/~]|\b(?:curl|wget)\s[^\n|]{1,160}\|\s{0,3}(?:ba)?sh\b|/dev/tcp/|\$\{jndi:"
            r"|\{\{\s{0,3}(?:config|self|7\s{0,2}\*\s{0,2}7)"
        ),
    ),
)


class CodeRules:
    """The rules, ready to be run."""

    def __init__(self) -> None:
        by_cue: dict[str, set[int]] = {}
        for number, (_, _, cues, _) in enumerate(_RULES):
            for cue in cues:
                by_cue.setdefault(cue, set()).add(number)
        self._rules_of = tuple(by_cue.values())
        self._cues = AhoCorasick(list(by_cue), store_patterns=False)

    def search(self, views: Views) -> tuple[Signal, ...]:
        """At most one signal, of the rule that scores highest."""
        text = views.folded.text
        due: set[int] = set()
        for cue, _, _ in self._cues.find_matches_as_indexes(text, overlapping=True):
            due |= self._rules_of[cue]
        found = [(_RULES[number][1], _RULES[number][0]) for number in due if _RULES[number][3].search(text)]
        if not found:
            return ()
        score, kind = max(found)
        return (Signal(DETECTOR, Category.CODE, min(MOST, score), rule=f"{DETECTOR}.{kind}"),)
