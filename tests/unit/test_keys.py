"""The text of an API key: its shape, and that a typo is found without any database."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tenants.access import Access
from tenants.database import Database
from tenants.errors import KeyMalformed, KeyUnknown, Unauthenticated
from tenants.key_text import BASE62, Plane, checksum, digest_secret, make_key, parse_key

PUBLISHED_PATTERN = re.compile(r"\bprc_(live|admin)_[0-9A-Za-z]{12}_[0-9A-Za-z]{49}\b")
"""What the documentation gives to leak scanners."""

TOKEN = make_key()[2]


@pytest.mark.parametrize(("plane", "prefix"), [(Plane.DATA, "prc_live_"), (Plane.ADMIN, "prc_admin_")])
def test_a_new_key_has_the_published_shape_and_reads_back(plane: Plane, prefix: str) -> None:
    key_id, secret, token = make_key(plane)
    assert PUBLISHED_PATTERN.fullmatch(token)
    assert token.startswith(prefix)
    assert parse_key(token) == (plane, key_id, secret)


def test_a_key_with_the_other_planes_prefix_is_malformed() -> None:
    with pytest.raises(KeyMalformed):
        parse_key(TOKEN.replace("prc_live_", "prc_admin_"))


def test_keys_do_not_repeat() -> None:
    made = [make_key() for _ in range(200)]
    assert len({key_id for key_id, _, _ in made}) == 200
    assert len({secret for _, secret, _ in made}) == 200


@given(st.integers(0, len(TOKEN) - 1), st.sampled_from(BASE62))
def test_any_changed_character_is_found(position: int, character: str) -> None:
    if TOKEN[position] == character:
        return
    with pytest.raises(KeyMalformed):
        parse_key(TOKEN[:position] + character + TOKEN[position + 1 :])


@given(st.integers(0, len(TOKEN) - 2))
def test_any_swapped_pair_is_found(position: int) -> None:
    first, second = TOKEN[position], TOKEN[position + 1]
    if first == second:
        return
    with pytest.raises(KeyMalformed):
        parse_key(TOKEN[:position] + second + first + TOKEN[position + 2 :])


@given(st.text(max_size=200))
def test_no_other_text_is_a_key(text: str) -> None:
    with pytest.raises(KeyMalformed):
        parse_key(text)


@pytest.mark.parametrize(
    "spoiled",
    [TOKEN + "\n", " " + TOKEN, TOKEN + "0", TOKEN[:-1], TOKEN.upper(), "", "\0"],
    ids=[
        "newline",
        "space",
        "longer",
        "shorter",
        "capitals",
        "empty",
        "zero",
    ],  # a key is another in every process
)
def test_nothing_around_a_key_is_overlooked(spoiled: str) -> None:
    with pytest.raises(KeyMalformed):
        parse_key(spoiled)


def test_the_checksum_covers_prefix_id_and_secret() -> None:
    assert checksum("prc_live_a") != checksum("prc_test_a")
    assert all(character in BASE62 for character in checksum(""))
    assert len(checksum("")) == 6


def test_the_digest_needs_the_pepper() -> None:
    assert digest_secret(b"a" * 32, "secret") != digest_secret(b"b" * 32, "secret")
    assert len(digest_secret(b"a" * 32, "secret")) == 32


async def test_a_typo_asks_no_database() -> None:
    access = Access(Database("postgresql://nobody@nowhere.invalid/none"), pepper=bytes(32))
    with pytest.raises(KeyMalformed):
        await access.authenticate(TOKEN[:-1] + ("0" if TOKEN[-1] != "0" else "1"))


def test_a_short_pepper_is_refused() -> None:
    with pytest.raises(ValueError, match="pepper"):
        Access(Database("postgresql://nobody@nowhere.invalid/none"), pepper=b"short")


def test_every_failure_reads_the_same() -> None:
    messages = {
        str(KeyMalformed()),
        *(str(KeyUnknown(reason=reason)) for reason in ("unknown", "revoked", "expired")),
    }
    assert messages == {"The API key is missing or not valid."}
    assert issubclass(KeyMalformed, Unauthenticated)
