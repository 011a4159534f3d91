"""Memory that is filled once and then nobody can change, not even root (memfd_create(2), fcntl(2)). Linux only."""

from __future__ import annotations

import fcntl
import os
import weakref
from pathlib import Path


class Memory:
    """A memory that was empty, and is gone once nothing maps it, has it open, or refers to this."""

    def __init__(self, name: str) -> None:
        """`name` shows in /proc, and is no path. Raises `OSError`."""
        self.descriptor = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        self.close = weakref.finalize(self, os.close, self.descriptor)

    @property
    def path(self) -> Path:
        """A file for as long as this is there; mappings of it outlive it."""
        return Path(f"/proc/self/fd/{self.descriptor}")

    def write(self, data: memoryview) -> int:
        """Append some of `data`; how much. Raises `OSError` where there is no memory left, or it is sealed."""
        return os.write(self.descriptor, data)

    def seal(self) -> None:
        seal(self.descriptor)


def seal(descriptor: int) -> None:
    """Let nobody change the memory behind `descriptor` any more. Raises `OSError`."""
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _seals())


def is_sealed(descriptor: int) -> bool:
    return fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & _seals() == _seals()


def _seals() -> int:
    """No writing (nor a shared mapping to write through), growing, shrinking, or taking back of seals."""
    return fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
