"""The keys that a model is trusted by come from a file, a descriptor or a command, or nothing starts."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from pydantic import ValidationError

from models import ANYONE, ModelRefused
from models.manifest import public_der
from service.custody import read_seal_key, read_trust
from service.settings import Settings

KEY = bytes(range(32))
PUBLIC = Ed25519PrivateKey.generate().public_key()


def piped(data: bytes) -> int:
    out, into = os.pipe()
    os.write(into, data)
    os.close(into)
    return out


def printing(text: str) -> list[str]:
    return [sys.executable, "-c", f"import sys; sys.stdout.buffer.write({text})"]


@pytest.fixture
def public_key(tmp_path: Path) -> Path:
    path = tmp_path / "key.pub"
    path.write_bytes(PUBLIC.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return path


@pytest.mark.parametrize("data", [KEY, KEY.hex().encode(), KEY.hex().upper().encode() + b"\n"])
def test_a_key_is_32_bytes_or_as_many_in_hex(data: bytes) -> None:
    descriptor = piped(data)
    assert read_seal_key(descriptor, ()) == KEY
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(descriptor)


@pytest.mark.parametrize("data", [b"", KEY[:-1], KEY + b"\n", b"secret words" * 5, b"x" * 5000])
def test_what_is_no_key_is_refused_and_not_repeated(data: bytes) -> None:
    with pytest.raises(ModelRefused, match="32 bytes") as caught:
        read_seal_key(piped(data), ())
    assert "secret" not in str(caught.value)


def test_a_command_prints_the_key_and_no_shell_runs_it() -> None:
    assert read_seal_key(None, printing("bytes(range(32))")) == KEY
    with pytest.raises(ModelRefused, match="32 bytes"):
        read_seal_key(None, ["/bin/echo", "$(head -c 32 /dev/zero)"])


def test_a_command_that_fails_gives_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelRefused, match="status 3"):
        read_seal_key(None, [sys.executable, "-c", "print('k' * 32, end=''); raise SystemExit(3)"])
    with pytest.raises(ModelRefused, match="cannot be run"):
        read_seal_key(None, ["/no/such/command"])
    monkeypatch.setattr("service.given_keys.COMMAND_S", 0.1)
    with pytest.raises(ModelRefused, match="longer"):
        read_seal_key(None, [sys.executable, "-c", "import time; time.sleep(60)"])
    with pytest.raises(ModelRefused, match="not open"):
        read_seal_key(999, ())
    assert read_seal_key(None, ()) is None


def test_settings_say_whose_models_are_served(public_key: Path, tmp_path: Path) -> None:
    assert read_trust(Settings()) == ANYONE
    settings: dict[str, Any] = {"model_key": public_key, "model_signature": tmp_path / "m.sig"}
    trust = read_trust(Settings(**settings, model_seal_fd=piped(KEY)))
    assert (trust.signer, trust.signature, trust.seal_key) == (
        public_der(PUBLIC),
        str(tmp_path / "m.sig"),
        KEY,
    )
    public_key.write_text("no key")
    with pytest.raises(ModelRefused, match="public key"):
        read_trust(Settings(model_key=public_key))


def test_the_command_is_json_in_the_environment(public_key: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERICARP_MODEL_KEY", str(public_key))
    monkeypatch.setenv("PERICARP_MODEL_SEAL_COMMAND", '["/bin/echo", "' + KEY.hex() + '"]')
    assert read_trust(Settings()).seal_key == KEY


@pytest.mark.parametrize(
    "settings",
    [
        {"model_seal_fd": 3},
        {"model_seal_command": ("kms",)},
        {"model_signature": "m.sig"},
        {"model_key": "PUBLIC", "model_seal_fd": 3, "model_seal_command": ("kms",)},
        {"model_key": "/no/such/file"},
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], public_key: Path) -> None:
    if settings.get("model_key") == "PUBLIC":
        settings = settings | {"model_key": public_key}
    with pytest.raises(ValidationError):
        Settings(**settings)
