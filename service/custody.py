"""The keys that a model is trusted by: who must have signed it, and what opens it where it is sealed.

The key of a sealed model is read from a descriptor that whoever starts us has opened, or is what a command prints (a
client of a key management service, say). It is in no argument, no environment and no file of ours.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cobblestone import KEY_BYTES
from models import ANYONE, ModelRefused, Trust
from models.manifest import public_der, read_public_key

if TYPE_CHECKING:
    from service.settings import Settings

COMMAND_S = 60.0
"""How long a command may take to print the key."""
_KEY_BYTES_MOST = 1024


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
    if descriptor is not None:
        try:
            with os.fdopen(descriptor, "rb") as file:
                return _decode(file.read(_KEY_BYTES_MOST), f"descriptor {descriptor}")
        except OSError as exc:
            raise ModelRefused(
                f"the key of sealed models cannot be read: descriptor {descriptor} is not open"
            ) from exc
    if not command:
        return None
    try:
        done = subprocess.run(
            list(command), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, timeout=COMMAND_S, check=True
        )
    except subprocess.CalledProcessError as exc:
        raise ModelRefused(
            f"the command for the key of sealed models ended with status {exc.returncode}"
        ) from None
    except subprocess.TimeoutExpired:
        raise ModelRefused(
            f"the command for the key of sealed models took longer than {COMMAND_S:g} s"
        ) from None
    except OSError as exc:
        raise ModelRefused(f"the command for the key of sealed models cannot be run: {exc.strerror}") from exc
    return _decode(done.stdout, "the command")


def _decode(data: bytes, source: str) -> bytes:
    if len(data) == KEY_BYTES:
        return data
    if re.fullmatch(rb"[0-9A-Fa-f]{64}\s*", data):
        return bytes.fromhex(data.decode())
    raise ModelRefused(
        f"the key of sealed models has {KEY_BYTES} bytes, or as many in hex; {source} gave {len(data)}"
    )
