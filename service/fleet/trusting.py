"""How a worker, or the owner of lent weights, is told whose model it may load.

The public key stands in its arguments, so that nobody can exchange a file for another; the key of a sealed model comes
through a pipe, is read once, and is in no argument and no environment.
"""

from __future__ import annotations

import argparse
import os
from base64 import b64decode, b64encode

from cobblestone import KEY_BYTES
from models import ModelRefused, Trust

REFUSED = 6
"""Exit status: the model's files are not those that may be served."""
SECRET_BYTES_MOST = 4096


def arguments(trust: Trust) -> tuple[str, ...]:
    """The arguments that say it; `{secret}` is the pipe with `trust.seal_key` (`children.Launch`)."""
    said: list[str] = []
    if trust.signer:
        said += ["--signer", b64encode(trust.signer).decode()]
    if trust.signature:
        said += ["--signature", trust.signature]
    if trust.seal_key:
        said += ["--seal-key", "{secret}"]
    return tuple(said)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--signer", default="")
    parser.add_argument("--signature", default="")
    parser.add_argument("--seal-key", type=int)


def read_trust(options: argparse.Namespace) -> Trust:
    """What they said. Raises `ModelRefused` where the pipe holds no key."""
    key = b""
    if options.seal_key is not None:
        with os.fdopen(options.seal_key, "rb") as pipe:
            key = pipe.read(SECRET_BYTES_MOST)
        if len(key) != KEY_BYTES:
            raise ModelRefused("the key of the sealed model did not come through")
    return Trust(b64decode(options.signer), options.signature, key)
