"""Of any value a line holds what may be told: numbers, words, sentences of ours; of the rest its type and length."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import SecretStr

from service.watch.redaction import SENTENCE_CHARS, WORD, plain, redact

KEY = "prc_live_" + "a" * 12 + "_" + "b" * 49


class Color(StrEnum):
    RED = "red"


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (None, None),
        (True, True),
        (7, 7),
        (2**63, "<int>"),
        (0.25, 0.25),
        (float("nan"), "nan"),
        (Color.RED, "red"),
        ("ValueError", "ValueError"),
        (UUID(int=5), "00000000-0000-0000-0000-000000000005"),
        (datetime(2026, 1, 31, tzinfo=UTC), "2026-01-31T00:00:00+00:00"),
        (("uid", "core"), ["uid", "core"]),
        ({"load": 1.5}, {"load": 1.5}),
        ("two words", "<str 9>"),
        ("a" * 81, "<str 81>"),
        ("红色", "<str 2>"),
        (KEY, f"<str {len(KEY)}>"),
        (b"\x89PNG", "<bytes 4>"),
        (bytearray(3), "<bytearray 3>"),
        (memoryview(b"12"), "<memoryview 2>"),
        ({1, 2}, "<set 2>"),
        (SecretStr("hush"), "<SecretStr>"),
        (Path("/home"), "<PosixPath>"),
        (ValueError("what was sent"), "<ValueError>"),
        ({"two words": b"1"}, {"<str 9>": "<bytes 1>"}),
        ([[[["deep"]]]], [[["<list 1>"]]]),
        (list(range(52)), [*range(50), "2 more"]),
    ],
)
def test_a_field_is_written_by_its_type(value: object, written: object) -> None:
    told = redact({"field": value})["field"]
    assert told == written and type(told) is type(written)


def test_a_sentence_of_ours_keeps_its_blanks_and_loses_secrets() -> None:
    told = redact({"reason": f"{KEY} at postgresql://me:hush@host/db\n and eyJhbGciOi.eyJzdWIi.c2ln"})
    assert told["reason"] == "<key> at postgresql://<credentials>@host/db and <token>"
    assert len(str(redact({"where": "x y " * 1000})["where"])) == SENTENCE_CHARS + 1


def test_names_of_logs_and_witnesses_may_be_urls_without_a_scheme() -> None:
    named = {
        "origin": "pericarp.example/log",
        "witness": "witness.example/1",
        "issuer": "https://login.example/",
    }
    assert redact(dict(named)) == named


@given(
    st.recursive(
        st.none() | st.integers() | st.floats() | st.text() | st.binary(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
        max_leaves=8,
    )
)
@settings(max_examples=50, deadline=None)
def test_whatever_is_logged_is_json_of_words(value: object) -> None:
    def check(told: object) -> None:
        if isinstance(told, list | dict):
            for each in [*told, *(told.values() if isinstance(told, dict) else ())]:
                check(each)
        elif isinstance(told, str):
            assert WORD.fullmatch(told) or told.startswith("<") or told.endswith(" more")

    told = plain(value)
    json.dumps(told)
    check(told)
