"""The keys that a model is trusted by: who must have signed it, and what opens it where it is sealed.

The key of a sealed model is read from a descriptor that whoever starts us has opened, or is what a command prints (a
client of a key management service, say). It is in no argument, no environment and no file of ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from models import ANYONE, ModelRefused, Trust
from models.manifest import public_der, read_public_key
from service.given_keys import KeyNotGiven, read_given_key

if TYPE_CHECKING:
    from service.settings import Settings


def read_trust(settings: Settings) -> Trust:
    """Whose models are served. Raises `ModelRefused` where a key cannot be had."""
    if settings.model_key is None:
        return ANYONE
    return Trust(
        signer=read_signer(settings.model_key),
        signature=str(settings.model_signature.resolve()) if settings.model_signature else "",
        seal_key=read_seal_key(settings.model_seal_fd, settings.model_seal_command) or b"",
    )


def read_signer(path: Path) -> bytes:
    """The public key of a PEM file, in DER. Raises `ModelRefused`."""
    try:
        return public_der(read_public_key(path.read_bytes()))
    except OSError as exc:
        raise ModelRefused(
            f"the public key that models are signed with cannot be read: {exc.strerror}"
        ) from exc


def read_seal_key(descriptor: int | None, command: Sequence[str]) -> bytes | None:
    """32 bytes, as they are or in hex, from `descriptor`, which is closed, or from `command`; None where neither is given.

    Raises `ModelRefused`, whose text holds nothing of what was read.
    """
    try:
        return read_given_key("the key of sealed models", descriptor, command)
    except KeyNotGiven as exc:
        raise ModelRefused(str(exc)) from exc
