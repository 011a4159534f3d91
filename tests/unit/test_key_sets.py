"""Providers' keys, fetched beside the requests: when, how often, and for how long they may be trusted."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from service import key_sets as module
from service.key_sets import AGAIN_S, REFRESH_S, TRUSTED_S, KeySets
from tenants.access import Role
from tenants.errors import KeySetMissing, TokenInvalid
from tenants.identities import Issuer
from tenants.key_text import Plane
from tenants.tokens import Tokens


@dataclass
class Clock:
    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


def key_set(*kids: str) -> bytes:
    keys = [
        {
            **json.loads(
                jwt.algorithms.ECAlgorithm.to_jwk(ec.generate_private_key(ec.SECP256R1()).public_key())
            ),
            "kid": kid,
        }
        for kid in kids
    ]
    return json.dumps({"keys": keys}).encode()


def issuer(**where: Any) -> Issuer:
    return Issuer(
        "corp",
        "https://corp.example/",
        ("pericarp",),
        frozenset({"ES256"}),
        tenant="acme",
        role=Role.SEARCH,
        **where,
    )


def asks(tokens: Tokens, kid: str) -> str:
    """What becomes of a token that names that key; its signature is nobody's."""
    token = jwt.encode(
        {"iss": "https://corp.example/"},
        ec.generate_private_key(ec.SECP256R1()),
        algorithm="ES256",
        headers={"kid": kid},
    )
    try:
        tokens.verify(token, plane=Plane.DATA)
    except KeySetMissing:
        return "missing"
    except TokenInvalid as refused:
        return refused.reason
    raise AssertionError("nobody signed it")


async def test_a_file_is_read_at_the_start_and_when_it_changes(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    source = issuer(keys_file=str(path))
    tokens, clock = Tokens((source,)), Clock()
    sets = KeySets((source,), tokens, clock=clock)
    await sets.look()
    assert asks(tokens, "first") == "missing"
    path.write_bytes(key_set("first"))
    await sets.look()
    assert asks(tokens, "first") == "token_signature"
    assert asks(tokens, "second") == "token_key"
    path.write_bytes(key_set("first", "second"))
    os.utime(path, ns=(1, 1))  # however coarse the file system's clock is
    await sets.look()
    assert asks(tokens, "second") == "token_signature"


async def test_a_file_that_is_spoiled_or_gone_leaves_the_keys_for_an_hour(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    path.write_bytes(key_set("first"))
    source = issuer(keys_file=str(path))
    tokens, clock = Tokens((source,)), Clock()
    sets = KeySets((source,), tokens, clock=clock)
    await sets.look()
    path.write_bytes(b"{")
    await sets.look()
    path.unlink()
    clock.now += TRUSTED_S
    await sets.look()
    assert asks(tokens, "first") == "token_signature"
    clock.now += 1
    await sets.look()
    assert asks(tokens, "first") == "missing"
    path.write_bytes(key_set("first"))
    await sets.look()
    assert asks(tokens, "first") == "token_signature"


async def test_a_url_is_fetched_every_so_often_and_no_sooner_whatever_tokens_say(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The network is an edge: what is asked of it is counted here, and really fetched by the acceptance tests."""
    source = issuer(keys_url="https://corp.example/keys")
    tokens, clock = Tokens((source,)), Clock()
    sets = KeySets((source,), tokens, clock=clock)
    served, fetched = [key_set("first")], []

    def fetch(asked: Issuer) -> bytes:
        fetched.append(clock.now)
        return served[-1]

    monkeypatch.setattr(module, "_fetch", fetch)
    await sets.look()
    for _ in range(100):
        assert asks(tokens, "second") == "token_key"
        await sets.look()
    assert len(fetched) == 1, "within ten seconds of the last fetch there is no other"
    served.append(key_set("first", "second"))
    clock.now += AGAIN_S
    await sets.look()
    assert asks(tokens, "second") == "token_signature"
    clock.now += REFRESH_S - 1
    await sets.look()
    assert len(fetched) == 2
    clock.now += 1
    await sets.look()
    assert len(fetched) == 3


async def test_a_provider_that_does_not_answer_is_asked_again_after_ten_seconds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = issuer(keys_url="https://corp.example/keys")
    tokens, clock = Tokens((source,)), Clock()
    sets = KeySets((source,), tokens, clock=clock)
    tried = []

    def fetch(asked: Issuer) -> bytes:
        tried.append(clock.now)
        if len(tried) < 3:
            raise OSError("no route")
        return key_set("first")

    monkeypatch.setattr(module, "_fetch", fetch)
    for _ in range(30):
        await sets.look()
        clock.now += 1
    assert [moment - tried[0] for moment in tried] == [0, AGAIN_S, 2 * AGAIN_S]
    assert asks(tokens, "first") == "token_signature"
