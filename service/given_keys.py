"""A key that whoever starts us hands over: on a descriptor that they opened, or by a command that prints it (a KMS's client).

So it is in no argument, no environment and no file of ours.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Sequence

from cobblestone import KEY_BYTES

COMMAND_S = 60.0
"""How long a command may take to print the key."""
_KEY_BYTES_MOST = 1024


class KeyNotGiven(Exception):
    """A key cannot be had, or is none. The text holds nothing of what was read."""


def read_given_key(what: str, descriptor: int | None, command: Sequence[str]) -> bytes | None:
    """32 bytes, as they are or in hex, from `descriptor`, which is closed, or from `command`; None where neither is given.

    `what` names the key in a text. Raises `KeyNotGiven`.
    """
    if descriptor is not None:
        try:
            with os.fdopen(descriptor, "rb") as file:
                return _decode(what, file.read(_KEY_BYTES_MOST), f"descriptor {descriptor}")
        except OSError as exc:
            raise KeyNotGiven(f"{what} cannot be read: descriptor {descriptor} is not open") from exc
    if not command:
        return None
    try:
        done = subprocess.run(
            list(command), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, timeout=COMMAND_S, check=True
        )
    except subprocess.CalledProcessError as exc:
        raise KeyNotGiven(f"the command for {what} ended with status {exc.returncode}") from None
    except subprocess.TimeoutExpired:
        raise KeyNotGiven(f"the command for {what} took longer than {COMMAND_S:g} s") from None
    except OSError as exc:
        raise KeyNotGiven(f"the command for {what} cannot be run: {exc.strerror}") from exc
    return _decode(what, done.stdout, "the command")


def _decode(what: str, data: bytes, source: str) -> bytes:
    if len(data) == KEY_BYTES:
        return data
    if re.fullmatch(rb"[0-9A-Fa-f]{64}\s*", data):
        return bytes.fromhex(data.decode())
    raise KeyNotGiven(f"{what} has {KEY_BYTES} bytes, or as many in hex; {source} gave {len(data)}")
