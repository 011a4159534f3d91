"""Wycheproof's JSON web signature and key vectors, where a checkout of them is at hand.

`PERICARP_TEST_WYCHEPROOF` names the folder `testvectors_v1` of C2SP/wycheproof. `test_tokens.py` has cases of the same
kinds that always run.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jwt
import pytest

from tenants.errors import KeySetInvalid, TokenInvalid
from tenants.identities import ALGORITHMS
from tenants.tokens import (
    TOKEN_LENGTH,
    VerifyingKey,
    _decode,
    _object,
    pick_algorithm,
    pick_key,
    read_key_set,
)

FOLDER = os.environ.get("PERICARP_TEST_WYCHEPROOF", "")
pytestmark = pytest.mark.skipif(not FOLDER, reason="PERICARP_TEST_WYCHEPROOF names no folder of vectors")


STRICTER = frozenset(
    {
        "emptyPayload",  # there are no claims in it
        "Figure20",  # signed by PS384 under a key that says that it is for PS256
    }
)
"""Valid signatures that we refuse. So are those under a key for `ES521`, which is no algorithm's name."""


def cases(name: str) -> Iterator[Any]:
    if not FOLDER:
        return
    for group in json.loads((Path(FOLDER) / f"{name}_test.json").read_text())["testGroups"]:
        for test in group["tests"]:
            yield pytest.param(group, test, id=f"{group.get('comment')}-{test['tcId']}")


def accepts(token: object, raw_keys: list[dict[str, Any]]) -> bool:
    """What `Tokens.verify` does before it looks at claims, with the same functions."""
    if not isinstance(token, str) or len(token) > TOKEN_LENGTH:
        return False
    try:
        keys: tuple[VerifyingKey, ...] = read_key_set(json.dumps({"keys": raw_keys}).encode())
        parts = token.split(".")
        if len(parts) != 3:
            return False
        header = _object(_decode(parts[0]))
        _decode(parts[1]), _decode(parts[2])
        algorithm = pick_algorithm(header, ALGORITHMS)
        key = pick_key(header, algorithm, keys)
        if key is None:
            return False
        jwt.PyJWS().decode_complete(token, key.key, algorithms=[algorithm])
    except (TokenInvalid, KeySetInvalid, jwt.PyJWTError):
        return False
    return True


@pytest.mark.parametrize(("group", "test"), list(cases("json_web_signature")))
def test_signatures(group: dict[str, Any], test: dict[str, Any]) -> None:
    raw = group.get("public")
    if raw is None:
        assert not accepts(test["jws"], [group["private"]]), "a shared secret is nobody's public key"
        return
    accepted = accepts(test["jws"], [raw])
    if test["result"] == "invalid":
        assert not accepted, test["comment"]
    elif raw.get("alg") not in ALGORITHMS or test["comment"] in STRICTER:
        assert not accepted
    else:
        assert accepted, test["comment"]


@pytest.mark.parametrize(("group", "test"), list(cases("json_web_key")))
def test_keys(group: dict[str, Any], test: dict[str, Any]) -> None:
    keys = group.get("public") or group["private"]
    accepted = accepts(test.get("jws"), keys["keys"])
    if "public" not in group:
        assert not accepted
    elif group["comment"] == "jws_rsa_roca_key":
        pytest.skip("weak primes of one maker's chips are not looked for")
    else:
        assert accepted == (test["result"] == "valid"), test["comment"]
