"""A model's folder written anew: every file but the signature sealed under a key (Cobblestone-256), or opened again.

What is written was checked as it was read: a file that its signer did not sign is in no such folder. The folder is
whole or not there.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import cobblestone
from models import ModelRefused
from models.folder import SEALED, Folder, seal_context
from models.manifest import SIGNATURE

Told = Callable[[int, int], object]
"""Called after each file: how many are written, of how many."""


def seal_folder(folder: Folder, out: Path, key: bytes, *, told: Told) -> None:
    """Write the sealed model to `out`, a folder that is not there yet. Raises `ModelRefused` and `OSError`."""
    if folder.sealed:
        raise ModelRefused("the model is sealed already")

    def write(file: str, target: BinaryIO) -> None:
        with cobblestone.Writer(target, key, seal_context(file)) as sealed:
            folder.pour(file, sealed)

    _write(folder, out, write, SEALED, told)


def unseal_folder(folder: Folder, out: Path, *, told: Told) -> None:
    """Write the plain model to `out`, a folder that is not there yet. Raises `ModelRefused` and `OSError`."""
    if not folder.sealed:
        raise ModelRefused("the model is not sealed")
    _write(folder, out, folder.pour, "", told)


def _write(
    folder: Folder, out: Path, write: Callable[[str, BinaryIO], object], suffix: str, told: Told
) -> None:
    if folder.signature is None:
        raise ModelRefused("the model is not signed, and nobody would know what was sealed")
    out.mkdir(mode=0o755)
    try:
        for done, file in enumerate(sorted(folder.names), 1):
            target = out / f"{file}{suffix}"
            target.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            with _create(target) as opened:
                write(file, opened)
                opened.flush()
                os.fsync(opened.fileno())
            told(done, len(folder.names))
        with _create(out / SIGNATURE) as opened:
            opened.write(folder.signature)
    except BaseException:
        shutil.rmtree(out)
        raise


def _create(path: Path) -> BinaryIO:
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644), "wb")
